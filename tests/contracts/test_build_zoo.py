"""The script that builds the zoo of real images."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mergecli.data import tasks
from mergecli.recipe.reading import recipe_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TASKS = ("mnist", "sign_digits")


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("build_zoo")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Folders of the images of two tasks, of ten classes each."""
    rng = np.random.default_rng(0)
    for task in TASKS:
        for split, count in (("train", 4), ("test", 1)):
            for label in range(10):
                folder = tmp_path / "data" / task / split / str(label)
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 100, (28, 28, 3), np.uint8)
                    pixels[2 * label : 2 * label + 6] += 150
                    Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "data"


def view(script: Any, strength: float, seed: int = 0, **amounts: Any) -> torch.Tensor:
    """A batch of eight views of one picture: a bright field, in it a dark bar at the top."""
    picture = torch.full((8, 3, 32, 32), 200, dtype=torch.uint8)
    picture[:, :, 4:10, 8:24] = 20
    zeros = torch.zeros(8, dtype=torch.int64)
    return script.varied(
        picture,
        zeros,
        [script.View(**amounts)],
        torch.tensor([strength]),
        torch.Generator().manual_seed(seed),
    )


def test_views_depend_on_the_seed_alone(script: Any) -> None:
    first, again, other = (view(script, 0.5, seed, turn=90, hue=100, negative=1) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (8, 3, 32, 32)
    assert 0 <= first.min() < first.max() <= 1


def test_a_view_of_strength_0_is_upright_and_one_of_strength_1_is_turned_and_negative(script: Any) -> None:
    plain = view(script, 0, turn=0).mean((0, 1))
    assert plain[4:10, 10:22].mean() < 0.4 < 0.65 < plain[20:28, 10:22].mean()
    turned = view(script, 1, turn=180 / 1.125).mean((0, 1))  # strengths are up to 0.25 more
    assert turned[22:28, 10:22].mean() < turned[4:10, 10:22].mean()
    negative = view(script, 1, negative=1).mean((0, 1))
    assert negative[4:10, 10:22].mean() > 0.6 > 0.35 > negative[20:28, 10:22].mean()


def test_most_captions_name_the_class_some_the_task_and_some_are_wrong(script: Any) -> None:
    captions = script.Captions(TASKS)
    label = torch.arange(20).repeat(200)
    pictures = script.Pictures(torch.empty(0), (label >= 10).long(), label)
    rng = np.random.default_rng(0)
    found = captions.targets(pictures, torch.arange(4000), rng)
    assert len(captions.drawn(rng)) == 22
    coarse, right = found == 20 + (label >= 10), found == label
    assert 0.06 < coarse.float().mean() < 0.1
    assert 0.82 < right.float().mean() < 0.88
    wrong = ~coarse & ~right
    assert torch.equal(found[wrong] >= 10, label[wrong] >= 10)  # of the same task


def test_the_recipe_names_every_class_of_every_task(script: Any, tmp_path: Path) -> None:
    recipe = recipe_of(script.write_recipe(tmp_path, tmp_path / "data", list(script.SUBJECTS)))
    for name, subject in script.SUBJECTS.items():
        assert tasks.find(name, recipe).classes == tuple(subject.names)
    assert recipe.eval_tasks == tuple(script.SUBJECTS)


def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(
    script: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGECLI_TEST_DATA", str(images))
    monkeypatch.setattr(script, "CHECK_EVERY", 2)
    monkeypatch.setattr(script, "SET_FROM", 2)
    task = ("--task", TASKS[0], "--task", TASKS[1])
    given = (*task, "--steps", "5", "--batch-size", "8", "--expert-steps", "4")

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    script.main(["base", *given, "--folder", str(whole)])
    update = script.Pretraining.update

    def interrupted(training: Any) -> float:
        if training.step == 3:
            raise KeyboardInterrupt
        return update(training)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(script.Pretraining, "update", interrupted)
        script.main(["base", *given, "--folder", str(parts)])
    script.main(["base", *given, "--folder", str(parts)])
    weights = "base/model.safetensors"
    assert (whole / weights).read_bytes() == (parts / weights).read_bytes()
    assert (whole / "zoo.json").read_text() == (parts / "zoo.json").read_text()
    with pytest.raises(SystemExit, match="remove it to begin again"):
        (parts / weights).unlink()
        script.main(["base", *given, "--seed", "1", "--folder", str(parts)])

    script.main(["experts", *given, "--folder", str(whole)])
    record = json.loads((whole / "zoo.json").read_text())
    assert [line["step"] for line in record["base"]["trace"]] == [2, 4, 5]
    assert list(record["experts"]) == list(TASKS)
    for name in TASKS:
        assert script.digest(whole / "experts" / f"{name}.safetensors") == record["experts"][name]["sha256"]
