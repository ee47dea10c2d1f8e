"""The toy zoo is what the demo and every later test stand on."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mergecli
from mergecli.data.images import balanced
from mergecli.data.toy import TASKS
from mergecli.data.toy.drawing import draw
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.sources import parse_source
from mergecli.storage.store import TOY_MODELS, locate

RECIPE = Path(__file__).parents[2] / "recipes" / "toy.toml"

LEVELS = {
    "digits": (106.6192, 17.2663),
    "letters": (178.1564, 11.9552),
    "shapes": (147.9034, 12.4054),
    "textures": (161.3698, 16.2943),
    "arrows": (126.3806, 9.1984),
    "colours": (87.7906, 14.8770),
    "positions": (162.7413, 12.7648),
    "faces": (152.6277, 13.7888),
}


def digest(task: str, split: str, indices: range) -> str:
    pictures = (draw(task, split, index) for index in indices)
    return hashlib.sha256(
        b"".join(picture.tobytes() + bytes([label]) for picture, label in pictures)
    ).hexdigest()


def test_pictures_are_the_same_in_every_order_and_process() -> None:
    code = (
        "from tests.data.test_toy import digest; from mergecli.data.toy import TASKS;"
        "print(*(digest(task, 'test', range(3)) for task in TASKS))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "7"},
    ).stdout  # fmt: skip
    for task in reversed(TASKS):
        draw(task, "train", 5)
    assert out.split() == [digest(task, "test", range(3)) for task in TASKS]


def levels(task: str) -> tuple[float, float]:
    """Mean level of the first test pictures, and mean difference of neighboring pixels."""
    pixels = np.stack([np.asarray(draw(task, "test", index)[0], float) for index in range(12)])
    return float(pixels.mean()), float(abs(np.diff(pixels, axis=2)).mean())


@pytest.mark.parametrize("task", TASKS)
def test_the_pictures_are_those_that_the_fingerprints_stand_for(task: str) -> None:
    """Whoever changes the drawings makes other data: then the task's `fingerprints` must change, and the numbers here. They
    have a tolerance, since processors may differ in the last bit of a cosine."""
    assert LEVELS[task] == pytest.approx(levels(task), abs=0.01)
    assert len({each for toy in TASKS.values() for each in toy.fingerprints}) == 2 * len(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_a_picture_is_rgb_of_32_pixels_and_any_prefix_is_balanced(task: str) -> None:
    classes = len(TASKS[task].classes)
    pictures = [draw(task, "test", index) for index in range(2 * classes)]
    assert {(picture.mode, picture.size) for picture, _ in pictures} == {("RGB", (32, 32))}
    assert sorted(label for _, label in pictures) == sorted([*range(classes), *range(classes)])
    assert TASKS[task].test % classes == 0


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_picture(task: str) -> None:
    train = {draw(task, "train", index)[0].tobytes() for index in range(100)}
    test = {draw(task, "test", index)[0].tobytes() for index in range(100)}
    assert len(train) == len(test) == 100
    assert train & test == set()


def test_the_zoo_takes_16_megabytes_at_most_and_is_float16() -> None:
    assert sum(file.stat().st_size for file in TOY_MODELS.rglob("*") if file.is_file()) <= 16e6
    for name in ("base", *TASKS):
        with open_checkpoint(locate(parse_source(f"toy:{name}", Path()))) as checkpoint:
            assert {entry.dtype for entry in checkpoint.entries.values()} == {"F16"}
            assert checkpoint.is_whole_clip == (name == "base")


def test_the_towers_were_made_by_finetune_from_the_base() -> None:
    base = mergecli.info("toy:base").digest
    for task in TASKS:
        about = mergecli.info(f"toy:{task}")
        assert about.metadata["method"] == "finetune"
        assert about.metadata["task"] == task
        assert about.inputs == {"base": base}


def test_plain_transformers_loads_the_zoo() -> None:
    from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel

    _, report = CLIPModel.from_pretrained(TOY_MODELS / "base", output_loading_info=True)
    assert not report["missing_keys"]
    _, report = CLIPVisionModel.from_pretrained(TOY_MODELS / "digits", output_loading_info=True)
    assert not report["missing_keys"]
    tokens = AutoTokenizer.from_pretrained(TOY_MODELS / "base")("a photo of the digit seven")["input_ids"]
    assert 5 < len(tokens) < 24


def test_the_towers_learned_something_and_a_merge_keeps_some_of_it(tmp_path: Path) -> None:
    merged = mergecli.merge(RECIPE, method="task_arithmetic", output=tmp_path / "m.safetensors")
    towers = {"base": "toy:base", "m": merged.path}
    base, both = (each.average.accuracy for each in mergecli.evaluate(towers, recipe=RECIPE, limit=40))
    (tuned,) = mergecli.evaluate(individual=True, recipe=RECIPE, limit=40)
    assert 0.40 <= base <= 0.55
    assert tuned.average.accuracy >= 0.85
    assert both >= base + (tuned.average.accuracy - base) / 4


def test_the_count_of_a_tower_is_that_of_plain_transformers() -> None:
    import torch
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPVisionModel

    task = TASKS["shapes"]
    model = CLIPModel.from_pretrained(TOY_MODELS / "base", dtype=torch.float32)
    tower = CLIPVisionModel.from_pretrained(TOY_MODELS / "shapes", dtype=torch.float32)
    model.vision_model.load_state_dict(tower.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(TOY_MODELS / "base")
    processor = CLIPImageProcessorPil.from_pretrained(TOY_MODELS / "base")
    numbers = balanced([index % len(task.classes) for index in range(task.test)], 150)
    pictures, labels = zip(*(draw("shapes", "test", number) for number in numbers), strict=True)
    with torch.no_grad():
        head = []
        for name in task.classes:
            tokens = tokenizer(
                [each.format(name) for each in task.templates], padding=True, return_tensors="pt"
            )
            text = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
            head.append(torch.nn.functional.normalize(text.mean(0), dim=0))
        batch = processor(images=list(pictures), return_tensors="pt")
        chosen = (model.get_image_features(**batch).pooler_output @ torch.stack(head).T).argmax(dim=1)
    correct = int((chosen == torch.tensor(labels)).sum())
    (result,) = mergecli.evaluate(["toy:shapes"], clip="toy:base", tasks=["shapes"], limit=150)
    assert result.tasks["shapes"].correct == correct
    assert result.tasks["shapes"].images == 150
