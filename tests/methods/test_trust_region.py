"""Trust-region task arithmetic."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import World, assert_same
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.methods.reference.trust_region import trust_region
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize("density", [0.99, 0.5])
def test_trust_region_is_task_arithmetic_without_the_entries_where_tasks_meet(
    world: World, density: float
) -> None:
    want = trust_region(world.base, list(world.tuned.values()), 0.3, density)
    assert_same(merged(world, "trust_region", density=density), with_integers(want, world), atol=1e-6)


def test_a_density_of_one_leaves_out_nothing_but_the_largest(world: World) -> None:
    base = {"w": torch.zeros(5)}
    tuned = [torch.tensor([1.0, 2, 3, 4, 0]), torch.tensor([4.0, 3, -3, 1, 7])]
    other = with_models(world, base, *({"w": each} for each in tuned))
    got = merged(other, "trust_region", density=1, scaling_factor=1)["w"]
    assert got.tolist() == [5.0, 5.0, 0.0, 5.0, 7.0], "|3| |-3| is the largest product"


def test_of_one_task_everything_is_kept(world: World) -> None:
    got = merged(world, "trust_region", ["t1"])
    want = task_arithmetic(world.base, [world.tuned["t1"]], 0.3)
    assert_same(got, with_integers(want, world), atol=1e-6)


def test_entries_that_only_one_task_changes_are_kept_however_few_others_are(world: World) -> None:
    base = {"w": torch.zeros(6)}
    tuned = [torch.tensor([1.0, 1, 1, 0, 0, 0]), torch.tensor([0.0, 0, 1, 1, 1, 1])]
    other = with_models(world, base, *({"w": each} for each in tuned))
    got = merged(other, "trust_region", density=0.5, scaling_factor=1)["w"]
    assert got.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
