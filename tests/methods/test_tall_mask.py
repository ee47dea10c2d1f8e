"""TALL masks: the tower of one task, or a file of all of them."""

from __future__ import annotations

import pytest
import torch

from mergecli import methods
from mergecli.methods._base import Unit
from mergecli.methods._mixture import Mixture, outcomes
from mergecli.runtime.errors import UsageError
from tests.conftest import Weights, World, assert_same
from tests.methods.reference.tall_mask import tall_mask
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.support.merging import merged, with_integers, with_models
from tests.support.mixture_files import BASE, TUNED, InMemory, all_same, towers

THRESHOLDS = [0.0, 0.4, 1.0]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_a_tall_mask_equals_the_one_of_whole_task_vectors(world: World, threshold: float) -> None:
    for number, task in enumerate(world.tuned):
        want = tall_mask(world.base, list(world.tuned.values()), number, threshold)
        got = merged(world, "tall_mask", task=task, mask_threshold=threshold)
        assert_same(got, with_integers(want, world), atol=1e-6)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_tall_masks_of_all_tasks_are_those_of_each(threshold: float) -> None:
    got = towers("tall_mask", BASE, TUNED, mask_threshold=threshold)
    all_same(got, [tall_mask(BASE, TUNED, place, threshold) for place in range(3)], atol=1e-6)
    for place, tower in enumerate(got):
        one = methods.create("tall_mask", {"task": f"t{place + 1}", "mask_threshold": threshold})
        assert isinstance(one, Mixture)
        assert not one.is_mixture
        assert one.unit is Unit.ENTRY
        plain: Weights = {}
        for group in InMemory(BASE, TUNED)():
            plain |= outcomes(one, group, None)
        assert_same(tower, plain)


def test_a_mask_threshold_of_zero_keeps_what_a_task_changed() -> None:
    got = towers("tall_mask", BASE, TUNED, mask_threshold=0)
    all_same(got, [task_arithmetic(BASE, TUNED, 1.0)] * 3, atol=1e-6)


def test_an_entry_as_large_as_the_others_together_is_not_larger(world: World) -> None:
    other = with_models(
        world, {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2])}, {"w": torch.tensor([1.0, 1])}
    )
    assert merged(other, "tall_mask", task="t1", mask_threshold=1)["w"].tolist() == [0, 3]


def test_the_tall_mask_of_one_task_is_that_task(world: World) -> None:
    assert_same(merged(world, "tall_mask", ["t1"], task="t1"), world.tuned["t1"], atol=1e-6)


def test_a_task_that_there_is_not_is_refused(world: World) -> None:
    message = r"`method.task`: there is no model `t11` \(did you mean `t1`\?\); there are t1, t2, t3"
    with pytest.raises(UsageError, match=message):
        merged(world, "tall_mask", task="t11")
