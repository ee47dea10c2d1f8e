"""MagMax."""

from __future__ import annotations

import torch

from tests.conftest import World, assert_same, random_weights
from tests.methods.reference.magmax import magmax
from tests.support.merging import merged, with_integers, with_models


def test_magmax_equals_one_argmax_over_all_tasks(world: World) -> None:
    want = magmax(world.base, list(world.tuned.values()), 0.8)
    assert_same(merged(world, "magmax", scaling_factor=0.8), with_integers(want, world), atol=1e-6)


def test_the_positive_one_of_a_tie_wins(world: World) -> None:
    other = with_models(
        world, {"w": torch.zeros(2)}, {"w": torch.tensor([2.0, 1])}, {"w": torch.tensor([-2.0, 3])}
    )
    assert merged(other, "magmax", scaling_factor=1)["w"].tolist() == [2, 3]


def test_magmax_of_one_task_is_that_task(world: World) -> None:
    assert_same(merged(world, "magmax", ["t2"], scaling_factor=1), world.tuned["t2"], atol=1e-6)


def test_magmax_is_ties_with_max_where_the_signs_agree(world: World) -> None:
    tuned = [
        {k: v + i * random_weights(9)[k].abs() if v.is_floating_point() else v for k, v in world.base.items()}
        for i in (1, 2, 3)
    ]
    other = with_models(world, world.base, *tuned)
    got = merged(other, "magmax", scaling_factor=0.6)
    assert_same(got, merged(other, "ties", density=1, aggregate="max", scaling_factor=0.6), atol=2e-6)
