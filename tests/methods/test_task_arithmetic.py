"""The base and the scaled sum of the task vectors."""

from __future__ import annotations

import torch

from tests.conftest import World, assert_same
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.support.merging import merged, with_integers, with_models


def test_task_arithmetic_equals_the_sum_of_whole_models(world: World) -> None:
    want = task_arithmetic(world.base, list(world.tuned.values()), 0.4)
    got = merged(world, "task_arithmetic", scaling_factor=0.4)
    assert_same(got, with_integers(want, world), atol=1e-6)


def test_a_scaling_factor_of_one_with_one_task_is_that_task(world: World) -> None:
    assert_same(merged(world, "task_arithmetic", ["t3"], scaling_factor=1), world.tuned["t3"], atol=1e-6)


def test_a_scaling_factor_of_one_over_t_is_the_average(world: World) -> None:
    got = merged(world, "task_arithmetic", scaling_factor=1 / 3)
    assert_same(got, merged(world, "average"), atol=1e-6)


def test_half_precision_models_are_summed_in_float32_and_rounded_once(world: World) -> None:
    half = {
        name: {k: v.half() if v.is_floating_point() else v for k, v in model.items()}
        for name, model in world.tuned.items()
    }
    base = {k: v.half() if v.is_floating_point() else v for k, v in world.base.items()}
    other = with_models(world, base, *half.values())
    wide = [{k: v.float() for k, v in model.items()} for model in half.values()]
    want = task_arithmetic({k: v.float() for k, v in base.items() if k != "steps"}, wide, 0.3)
    got = merged(other, "task_arithmetic")
    assert_same(got, with_integers({k: v.half() for k, v in want.items()}, other), atol=2e-3)
    assert got["scale"].dtype == torch.float16
