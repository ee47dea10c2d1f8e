"""Consensus merging: entries on which TALL masks agree."""

from __future__ import annotations

import pytest
import torch

from mergecli.runtime.errors import UsageError
from tests.conftest import World, assert_same
from tests.methods.reference.consensus import consensus
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize("agreeing", [0, 1, 2, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_consensus_equals_the_one_of_whole_task_vectors(
    world: World, threshold: float, agreeing: int
) -> None:
    want = consensus(world.base, list(world.tuned.values()), 0.7, agreeing, threshold)
    got = merged(world, "consensus", scaling_factor=0.7, agreeing_tasks=agreeing, mask_threshold=threshold)
    assert_same(got, with_integers(want, world), atol=1e-6)


def test_an_entry_as_large_as_the_others_together_is_not_larger(world: World) -> None:
    other = with_models(
        world, {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2])}, {"w": torch.tensor([1.0, 1])}
    )
    got = merged(other, "consensus", mask_threshold=1, agreeing_tasks=1, scaling_factor=1)
    assert got["w"].tolist() == [0, 3]


def test_consensus_of_no_task_is_task_arithmetic(world: World) -> None:
    assert_same(merged(world, "consensus", agreeing_tasks=0), merged(world, "task_arithmetic"))


def test_more_agreeing_tasks_than_there_are_is_refused(world: World) -> None:
    message = r"`method.agreeing_tasks`: expected at most the number of tasks, 1, got 2"
    with pytest.raises(UsageError, match=message):
        merged(world, "consensus", ["t1"])
