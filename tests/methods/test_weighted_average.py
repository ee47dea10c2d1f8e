"""The mean with a weight for each model."""

from __future__ import annotations

import pytest

from mergecli.runtime.errors import UsageError
from tests.conftest import World, assert_same
from tests.methods.reference.weighted_average import weighted_average
from tests.support.merging import merged, with_integers


@pytest.mark.parametrize("normalize", [True, False])
def test_weighted_average_equals_the_sum_of_whole_models(world: World, normalize: bool) -> None:
    want = weighted_average(list(world.tuned.values()), [1, 2.5, -0.5], normalize)
    got = merged(world, "weighted_average", weights=[1, 2.5, -0.5], normalize=normalize)
    assert_same(got, with_integers(want, world), atol=1e-6)


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
        ([0.1, 0.2, -0.3], "add up to 0"),  # in float64 to 6e-17
        ([1, "a", 1], r"`method.weights`: expected a list, each a number, got \[1, \"a\", 1\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(world: World, weights: list[object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merged(world, "weighted_average", weights=weights)
