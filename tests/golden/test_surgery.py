"""Representation surgery on features made by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mergecli import methods
from mergecli.methods._base import uniform
from mergecli.methods.representation_surgery import DOWN, UP, RepresentationSurgery
from mergecli.runtime.errors import InputError
from tests.golden import naive_surgery


def surgery(**settings: Any) -> RepresentationSurgery:
    return cast("RepresentationSurgery", methods.create("representation_surgery", settings))


def unit(count: int, size: int, seed: int) -> Tensor:
    """(count, size) unit vectors, some of whose numbers are far larger than others."""
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    rows = rows * torch.linspace(0.1, 2, size)
    return rows / rows.norm(dim=-1, keepdim=True)


def start(rank: int, size: int, task: str, seed: int) -> Tensor:
    return (2 * uniform(seed, DOWN, task, 0, rank * size).view(rank, size) - 1) / math.sqrt(size)


def batches(count: int, size: int, steps: int, task: str, seed: int) -> Iterator[Tensor]:
    """All images in the order of random numbers, and again."""

    def rounds() -> Iterator[Tensor]:
        for epoch in itertools.count():
            order = uniform(seed, "surgery.batches", f"{task} {epoch}", 0, count).argsort()
            yield from order.split(size)

    return itertools.islice(rounds(), steps)


def corrected(method: RepresentationSurgery, down: Tensor, up: Tensor, features: Tensor) -> Tensor:
    """What a file with these two tensors for its second task makes of features."""
    file = {DOWN: torch.stack([down + 1, down]), UP: torch.stack([up - 1, up])}
    return method.correction(1, file.__getitem__)(features)


@pytest.mark.parametrize("shape", [(50, 8, 4, 16), (7, 24, 16, 16), (40, 8, 1, 5)])
def test_it_equals_the_naive_one(shape: tuple[int, int, int, int]) -> None:
    count, size, rank, batch = shape
    features, wanted = unit(count, size, 1), unit(count, size, 2)
    method = surgery(rank=rank, steps=60, batch_size=batch, learning_rate=1e-2, feature_size=size)
    down, up, losses = method.learn(features, wanted, "a", 3)
    module, want = naive_surgery.representation_surgery(
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
