from __future__ import annotations

import pytest
import torch

from mergecli.errors import UsageError
from tests.conftest import World, assert_same
from tests.golden import naive
from tests.support.merging import merged, with_models


def test_average_equals_the_naive_mean(world: World) -> None:
    want = naive.average(list(world.tuned.values()))
    assert_same(merged(world, "average"), {**want, "steps": world.base["steps"]}, atol=1e-6)


def test_average_of_one_model_is_that_model(world: World) -> None:
    assert_same(merged(world, "average", ["t2"]), world.tuned["t2"])


def test_average_of_equal_models_is_each_of_them(world: World) -> None:
    same = with_models(world, world.base, *[world.tuned["t1"]] * 4)
    assert_same(merged(same, "average"), world.tuned["t1"])


def test_weighted_average_equals_the_naive_one_with_and_without_normalization(world: World) -> None:
    tuned = list(world.tuned.values())
    for normalize in (True, False):
        want = naive.weighted_average(tuned, [1, 2.5, -0.5], normalize)
        got = merged(world, "weighted_average", weights=[1, 2.5, -0.5], normalize=normalize)
        assert_same(got, {**want, "steps": world.base["steps"]}, atol=1e-6)


def test_equal_weights_give_the_average(world: World) -> None:
    got = merged(world, "weighted_average", weights=[2, 2, 2])
    assert_same(got, merged(world, "average"), atol=1e-6)


def test_a_weight_of_one_and_zeros_gives_that_model(world: World) -> None:
    assert_same(merged(world, "weighted_average", weights=[0, 1, 0]), world.tuned["t2"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], r"`method.weights`: expected one number for each of 3 models, got 2"),
        ([1, -2, 1], r"`method.weights`: the weights add up to 0"),
        ([1, "a", 1], r"`method.weights`: expected a list, each a number, got \[1, \"a\", 1\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(world: World, weights: list[object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merged(world, "weighted_average", weights=weights)


def test_task_arithmetic_equals_the_naive_sum(world: World) -> None:
    want = naive.task_arithmetic(world.base, list(world.tuned.values()), 0.4)
    got = merged(world, "task_arithmetic", scaling_factor=0.4)
    assert_same(got, {**want, "steps": world.base["steps"]}, atol=1e-6)


def test_task_arithmetic_at_zero_is_the_base_and_at_one_with_one_task_is_that_task(world: World) -> None:
    assert_same(merged(world, "task_arithmetic", scaling_factor=0), world.base)
    assert_same(merged(world, "task_arithmetic", ["t3"], scaling_factor=1), world.tuned["t3"], atol=1e-6)


def test_task_arithmetic_at_one_over_t_is_the_average(world: World) -> None:
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
    want = naive.task_arithmetic({k: v.float() for k, v in base.items() if k != "steps"}, wide, 0.3)
    got = merged(other, "task_arithmetic")
    assert_same(got, {**{k: v.half() for k, v in want.items()}, "steps": base["steps"]}, atol=2e-3)
    assert got["scale"].dtype == torch.float16
