"""The plain mean."""

from __future__ import annotations

from tests.conftest import World, assert_same
from tests.methods.reference.average import average
from tests.support.merging import merged, with_integers, with_models


def test_average_equals_the_mean_of_whole_models(world: World) -> None:
    want = average(list(world.tuned.values()))
    assert_same(merged(world, "average"), with_integers(want, world), atol=1e-6)


def test_average_of_one_model_is_that_model(world: World) -> None:
    assert_same(merged(world, "average", ["t2"]), world.tuned["t2"])


def test_average_of_equal_models_is_each_of_them(world: World) -> None:
    same = with_models(world, world.base, *[world.tuned["t1"]] * 4)
    assert_same(merged(same, "average"), world.tuned["t1"])
