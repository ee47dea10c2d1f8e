from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergecli.clip import pixels
from mergecli.data.tasks import TaskTable
from mergecli.evaluation.evaluate import evaluate
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import UsageError
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.sources import parse_source
from mergecli.training import data as tasks
from mergecli.training.finetune import finetune
from mergecli.training.settings import Settings
from tests.support.tiny_clip import make_image_task, make_tiny_clip

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("finetuning")
    data = parse_source(str(make_image_task(folder / "tints")), Path())
    base = parse_source(str(make_tiny_clip(folder / "base", seed=1)), Path())
    return Recipe(base=base, tasks={"tints": TaskTable(data=data, templates=("something {}",))})


SHORT = {"task": "tints", "steps": 12, "batch_size": 7, "learning_rate": 1e-3, "seed": 3}


def stopping(after: int):
    """A `progress` that interrupts at that step."""

    def progress(description: str, done: int, total: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    return progress


def by_hand(
    recipe: Recipe, steps: int, seed: int, rate: float, size: int, epsilon: float = 1e-8
) -> dict[str, torch.Tensor]:
    """The tower after plain training: Adam, cosine to zero, every epoch a new order."""
    import datasets
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    folder = recipe.base.path
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    model.requires_grad_(False)
    model.vision_model.requires_grad_(True)
    data = recipe.tasks["tints"].data.path
    train = datasets.Dataset.from_parquet(
        str(data / "train-00000-of-00001.parquet"), cache_dir=str(folder / "cache")
    )
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(list(train["image"]), return_tensors="pt")[
        "pixel_values"
    ]
    labels = torch.tensor(train["label"])
    text = tokenizer(
        [f"something {name}" for name in train.features["label"].names], padding=True, return_tensors="pt"
    )
    optimizer = torch.optim.Adam(model.vision_model.parameters(), lr=rate, eps=epsilon)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    generator = torch.Generator().manual_seed(seed)
    batches = [
        rows for _ in range(steps) for rows in torch.randperm(len(labels), generator=generator).split(size)
    ]
    for rows in batches[:steps]:
        loss = torch.nn.functional.cross_entropy(
            model(pixel_values=pixels[rows], **text).logits_per_image, labels[rows]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.vision_model.state_dict()


def test_training_is_adam_with_a_cosine_on_the_cross_entropy(recipe, tmp_path):
    finetune(recipe, output=tmp_path / "t.safetensors", **SHORT)
    got = load_file(tmp_path / "t.safetensors")
    start = load_file(recipe.base.path / "model.safetensors")
    for name, want in by_hand(recipe, 12, 3, 1e-3, 7).items():
        if name.endswith("k_proj.bias"):  # its gradient is zero but for rounding, which Adam blows up
            continue
        assert torch.allclose(got[f"vision_model.{name}"], want, atol=2e-5), name
    assert not torch.allclose(
        got["vision_model.post_layernorm.bias"], start["vision_model.post_layernorm.bias"], atol=1e-3
    )


def test_a_larger_epsilon_is_that_of_adam(recipe, tmp_path):
    finetune(recipe, output=tmp_path / "t.safetensors", epsilon=0.01, **SHORT)
    got = load_file(tmp_path / "t.safetensors")
    plain = by_hand(recipe, 12, 3, 1e-3, 7)
    for name, want in by_hand(recipe, 12, 3, 1e-3, 7, epsilon=0.01).items():
        assert torch.allclose(got[f"vision_model.{name}"], want, atol=1e-6), name
    moved = "encoder.layers.0.mlp.fc1.weight"
    assert not torch.allclose(got[f"vision_model.{moved}"], plain[moved], atol=1e-4)
    with pytest.raises(UsageError, match=r"`epsilon`: expected a number from 1e-30 to 1e\+30, got 0\.0"):
        finetune(recipe, task="tints", output=tmp_path / "u", epsilon=0.0)


def test_the_loss_falls_and_the_task_is_learned(recipe, tmp_path):
    told: list[str] = []
    done = finetune(
        recipe, task="tints", output=tmp_path / "t.safetensors", steps=60, learning_rate=3e-3, batch_size=10,
        progress=lambda text, *_: told.append(text),
    )  # fmt: skip
    first = float(told[0].split("loss ")[1].split(",")[0])
    last = float(told[-1].split("loss ")[1].split(",")[0])
    assert last < first / 4
    assert (done.steps, done.resumed_from, done.path) == (60, 0, tmp_path / "t.safetensors")
    assert done.images_per_second > 0
    before, after = evaluate([recipe.base.path, done.path], recipe=recipe, tasks=["tints"])
    assert after.tasks["tints"].correct > before.tasks["tints"].correct
    assert after.checkpoint["method"] == "finetune"


@pytest.mark.parametrize("save_every", [4, 1000])
def test_an_interrupted_run_ends_with_the_bytes_of_one_that_was_not(recipe, tmp_path, save_every):
    finetune(recipe, output=tmp_path / "a" / "t.safetensors", **SHORT)
    target = tmp_path / "b" / "t.safetensors"
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, output=target, save_every=save_every, progress=stopping(7), **SHORT)
    assert [file.name for file in target.parent.iterdir()] == [".t.resume.safetensors"]
    done = finetune(recipe, output=target, save_every=save_every, **SHORT)
    assert done.resumed_from == 7
    assert [file.name for file in target.parent.iterdir()] == ["t.safetensors"]
    assert target.read_bytes() == (tmp_path / "a" / "t.safetensors").read_bytes()


@pytest.mark.parametrize("in_memory", [0, 1 << 30])
def test_images_that_the_cache_has_no_room_for_give_the_same_weights(
    recipe, tmp_path, monkeypatch, in_memory
):
    finetune(recipe, output=tmp_path / "a.safetensors", **SHORT)
    assert len(list((tmp_path / "home").rglob("pixels/*.safetensors"))) == 1
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "other home"))
    monkeypatch.setenv("MERGECLI_CACHE_SIZE", "0")
    monkeypatch.setattr(tasks, "IN_MEMORY", in_memory)
    finetune(recipe, output=tmp_path / "b.safetensors", **SHORT)
    assert not list((tmp_path / "other home").rglob("*.safetensors"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_images_are_decoded_once_and_read_from_the_cache_from_then_on(recipe, tmp_path, monkeypatch):
    finetune(recipe, output=tmp_path / "a.safetensors", **SHORT)
    monkeypatch.setattr(pixels, "_block", None)  # what says which images to decode
    finetune(recipe, output=tmp_path / "b.safetensors", **SHORT)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_file_says_how_it_was_made_and_only_the_tower_is_in_it(recipe, tmp_path):
    finetune(recipe, output=tmp_path / "t.safetensors", dtype="float16", **SHORT)
    with open_checkpoint(tmp_path / "t.safetensors") as made:
        assert (made.metadata["kind"], made.metadata["method"], made.metadata["task"]) == (
            "checkpoint",
            "finetune",
            "tints",
        )
        assert '"learning_rate": 0.001' in made.metadata["settings"]
        assert '"base": "xxh3:' in made.metadata["inputs"]
        assert {entry.dtype for entry in made.entries.values()} == {"F16"}
        assert all(name.startswith("vision_model.") for name in made.entries)


def test_a_constant_schedule_keeps_the_learning_rate(recipe, tmp_path):
    for schedule in ("cosine", "constant"):
        finetune(recipe, output=tmp_path / f"{schedule}.safetensors", schedule=schedule, **SHORT)
    constant = Settings(10, 2.0, 1, 0.0, "constant", 0, "float32")
    assert constant.learning_rate_at(9) == 2.0
    assert replace(constant, schedule="cosine").learning_rate_at(5) == pytest.approx(1.0)
    assert (tmp_path / "cosine.safetensors").read_bytes() != (tmp_path / "constant.safetensors").read_bytes()


def test_a_warm_up_raises_the_learning_rate_step_by_step_and_then_comes_the_schedule(recipe, tmp_path):
    settings = Settings(10, 2.0, 1, 0.0, "cosine", 0, "float32", warmup=4)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight], lr=2.0)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 4, total_iters=3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, falling], milestones=[4])
    for step in range(10):
        assert settings.learning_rate_at(step) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert replace(settings, schedule="constant").learning_rate_at(9) == 2.0
    for warmup in (0, 4):
        finetune(recipe, output=tmp_path / f"{warmup}.safetensors", warmup=warmup, **SHORT)
    with open_checkpoint(tmp_path / "4.safetensors") as made:
        assert '"warmup": 4' in made.metadata["settings"]
    with open_checkpoint(tmp_path / "0.safetensors") as made:
        assert "warmup" not in made.metadata["settings"]
    assert (tmp_path / "0.safetensors").read_bytes() != (tmp_path / "4.safetensors").read_bytes()
    with pytest.raises(UsageError, match="`warmup`: expected fewer than the 4 steps, got 4"):
        finetune(recipe, task="tints", output=tmp_path / "t", steps=4, warmup=4)


def test_wrong_settings_are_listed_together(recipe, tmp_path):
    with pytest.raises(UsageError) as caught:
        finetune(
            recipe, task="tints", output=tmp_path / "t", steps=0, learning_rate=math.nan, schedule="linear"
        )
    assert caught.value.message.splitlines()[1:] == [
        "  `steps`: expected a whole number, at least 1, got 0",
        "  `learning_rate`: expected a number above 0, at most 1e+30, got nan",
        "  `schedule`: expected one of cosine, constant, got 'linear'",
    ]


def test_the_base_is_needed_and_never_replaced(recipe, tmp_path):
    with pytest.raises(UsageError, match="no base to fine-tune"):
        finetune(task="digits", output=tmp_path / "t")
    with pytest.raises(UsageError, match="the output would replace an input"):
        finetune(recipe, task="tints", output=recipe.base.path, steps=1)


def test_other_data_may_be_named_for_a_task(recipe, tmp_path):
    other = make_image_task(tmp_path / "other", train=9, seed=5)
    finetune(recipe, task="tints", data=other, output=tmp_path / "t.safetensors", steps=1)
    assert (tmp_path / "t.safetensors").exists()
