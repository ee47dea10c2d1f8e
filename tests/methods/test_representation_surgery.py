"""Representation surgery: on features made by hand, and of a merged CLIP."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecli import methods
from mergecli.merging.merge import merge
from mergecli.methods.representation_surgery import DOWN, UP, RepresentationSurgery
from mergecli.runtime.errors import InputError
from tests.conftest import Weights
from tests.methods.reference.representation_surgery import batches, representation_surgery, start
from tests.support.image_zoo import CLASSES, Zoo

VISION = "vision_model."


def surgery(**settings: Any) -> RepresentationSurgery:
    return cast("RepresentationSurgery", methods.create("representation_surgery", settings))


def unit(count: int, size: int, seed: int) -> Tensor:
    """(count, size) unit vectors, some of whose numbers are far larger than others."""
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    rows = rows * torch.linspace(0.1, 2, size)
    return rows / rows.norm(dim=-1, keepdim=True)


def corrected(method: RepresentationSurgery, down: Tensor, up: Tensor, features: Tensor) -> Tensor:
    """What a file with these two tensors for its second task makes of features."""
    file = {DOWN: torch.stack([down + 1, down]), UP: torch.stack([up - 1, up])}
    return method.correction(1, file.__getitem__)(features)


@pytest.mark.parametrize("shape", [(50, 8, 4, 16), (7, 24, 16, 16), (40, 8, 1, 5)])
def test_a_correction_equals_the_one_that_autograd_and_torchs_own_adam_learn(
    shape: tuple[int, int, int, int],
) -> None:
    count, size, rank, batch = shape
    features, wanted = unit(count, size, 1), unit(count, size, 2)
    method = surgery(rank=rank, steps=60, batch_size=batch, learning_rate=1e-2, feature_size=size)
    down, up, losses = method.learn(features, wanted, "a", 3)
    module, want = representation_surgery(
        features, wanted, start(rank, size, "a", 3), batches(count, batch, 60, "a", 3), 1e-2
    )
    # steps of 1e-2 are rounded to 1e-9, sixty times over
    torch.testing.assert_close(down, module.down.weight.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(up, module.up.weight.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(losses, torch.tensor(want), rtol=0, atol=1e-6)
    got = corrected(method, down, up, features)
    torch.testing.assert_close(got, module(features).detach(), rtol=0, atol=1e-6)


def test_towards_features_that_are_the_same_nothing_changes() -> None:
    features, method = unit(30, 8, 1), surgery(steps=50, feature_size=8)
    down, up, losses = method.learn(features, features, "a", 0)
    assert not up.any()
    assert not losses.any()
    assert corrected(method, down, up, features).equal(features)


def test_zero_steps_change_nothing() -> None:
    features, method = unit(30, 8, 1), surgery(steps=0, feature_size=8)
    down, up, losses = method.learn(features[:0], features[:0], "a", 0)
    assert losses.shape == (0,)
    assert corrected(method, down, up, features).equal(features)


def test_the_loss_falls_and_the_features_come_nearer() -> None:
    features, turn = unit(200, 16, 1), torch.linalg.qr(torch.eye(16) + 0.1 * unit(16, 16, 5))[0]
    wanted = features @ (turn * turn.diagonal().sign())
    method = surgery(steps=400, feature_size=16)
    down, up, losses = method.learn(features, wanted, "a", 0)
    assert losses[-50:].mean() < 0.8 * losses[:50].mean()
    after = (corrected(method, down, up, features) - wanted).abs().mean()
    assert after < 0.8 * (features - wanted).abs().mean()


def test_the_start_is_kaimings_and_differs_from_task_to_task_and_seed_to_seed() -> None:
    none = torch.zeros(0, 400)
    one, other, another = (
        surgery(steps=0).learn(none, none, *which)[0] for which in (("a", 0), ("b", 0), ("a", 1))
    )
    assert not one.equal(other)
    assert not one.equal(another)
    assert 0.99 / 20 < one.abs().max() <= 1 / 20
    assert one.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)  # of 6400 numbers


def test_each_image_is_looked_at_once_before_any_is_again() -> None:
    method = surgery(batch_size=3)
    rows = torch.cat(list(itertools.islice(method._batches(10, "a", 0), 8))).tolist()  # pyright: ignore[reportPrivateUsage]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


@pytest.mark.parametrize(
    ("settings", "images", "looked"),
    [({}, 50, 50), ({}, 20000, 16000), ({"images": 40}, 50, 40), ({"images": 40, "steps": 2}, 50, 32),
     ({"steps": 0}, 50, 0)],
)  # fmt: skip
def test_no_more_images_are_looked_at_than_the_steps_take(
    settings: dict[str, Any], images: int, looked: int
) -> None:
    assert surgery(**settings).looked_at(images) == looked


def test_features_of_another_size_are_refused() -> None:
    method = surgery(steps=0, feature_size=8)
    down, up, _ = method.learn(unit(1, 8, 0), unit(1, 8, 0), "a", 0)
    with pytest.raises(InputError, match="is of features of size 8, the base's have 9"):
        corrected(method, down, up, unit(3, 9, 0))


@pytest.fixture(scope="module")
def merged(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower merged from all of the zoo's."""
    output = tmp_path_factory.mktemp("merged") / "merged.safetensors"
    merge(zoo.folder / "zoo.toml", method="task_arithmetic", output=output)
    return output


def operate(zoo: Zoo, tower: Path, output: Path, **settings: Any) -> Weights:
    """The file that surgery on a tower writes."""
    short = {"steps": 12, "batch_size": 5, "rank": 3, "learning_rate": 1e-2, "merged": str(tower)}
    recipe = zoo.folder / "zoo.toml"
    merge(recipe, method="representation_surgery", settings={**short, **settings}, output=output)
    return load_file(output)


def features(zoo: Zoo, weights: Weights, pixels: Tensor) -> Tensor:
    """(N, D) unit features that a tower with these weights gives."""
    clip = zoo.clip()
    clip.tower.load_state_dict({name.removeprefix(VISION): value for name, value in weights.items()})
    found = clip.model(pixels)
    return found / found.norm(dim=-1, keepdim=True)


@pytest.mark.usefixtures("own_store")
def test_surgery_on_a_merged_clip_learns_the_correction_of_each_tasks_features(
    zoo: Zoo, merged: Path, tmp_path: Path
) -> None:
    file, tower = operate(zoo, merged, tmp_path / "s.safetensors", split="train"), load_file(merged)
    assert file[DOWN].shape == (3, 3, 8)
    for place, task in enumerate(CLASSES):
        pixels = zoo.pixels(task, 100, shuffle=False)
        own, given = features(zoo, zoo.tuned[task], pixels), features(zoo, tower, pixels)
        rows = batches(len(pixels), 5, 12, task, 0)
        module, _ = representation_surgery(given, own, start(3, 8, task, 0), rows, 1e-2)
        # features differ by 1e-7, and a step is their gradient over its own size
        torch.testing.assert_close(file[UP][place], module.up.weight.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(file[DOWN][place], module.down.weight.detach(), rtol=0, atol=1e-5)
    for name, value in tower.items():
        assert file[name].equal(value)


@pytest.mark.usefixtures("own_store")
def test_a_merged_tower_that_is_a_tasks_own_is_left_alone_on_that_task(zoo: Zoo, tmp_path: Path) -> None:
    up = operate(zoo, zoo.folder / "a.safetensors", tmp_path / "s.safetensors")[UP]
    assert not up[0].any()
    assert up[1:].abs().amax((1, 2)).min() > 1e-3
