"""The straight line between two models."""

from __future__ import annotations

import pytest

from mergecli.runtime.errors import UsageError
from tests.conftest import World, assert_same
from tests.methods.reference.linear import linear
from tests.support.merging import merged, with_integers


@pytest.mark.parametrize("t", [-0.5, 0, 0.3, 1, 2])
def test_linear_equals_the_line_between_whole_models(world: World, t: float) -> None:
    tuned = [world.tuned["t1"], world.tuned["t3"]]
    got = merged(world, "linear", ["t1", "t3"], t=t)
    assert_same(got, with_integers(linear(tuned, t), world), atol=1e-6)
    if t in (0, 1):
        assert_same(got, tuned[int(t)])


def test_linear_at_the_middle_is_the_average(world: World) -> None:
    assert_same(merged(world, "linear", ["t1", "t2"]), merged(world, "average", ["t1", "t2"]), atol=1e-6)


def test_linear_takes_two_models(world: World) -> None:
    with pytest.raises(UsageError, match="`linear` merges exactly 2 models, got 3"):
        merged(world, "linear")


def test_a_place_on_the_line_that_would_leave_float32_is_refused(world: World) -> None:
    with pytest.raises(UsageError, match="expected a number"):
        merged(world, "linear", t=4e38)
