"""Model Stock."""

from __future__ import annotations

import pytest
import torch

from mergecli.runtime.errors import UsageError
from tests.conftest import World, assert_same, random_weights
from tests.methods.reference.model_stock import model_stock
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize("tasks", [["t1", "t2"], ["t1", "t2", "t3"]])
def test_model_stock_equals_the_formula_of_every_pairs_angle(world: World, tasks: list[str]) -> None:
    shared = random_weights(20)
    tuned = [
        {k: v + 0.1 * shared[k] if v.is_floating_point() else v for k, v in world.tuned[task].items()}
        for task in tasks
    ]
    other = with_models(world, world.base, *tuned)
    want = with_integers(model_stock(world.base, tuned), world)
    assert_same(merged(other, "model_stock"), want, atol=2e-6)


def test_model_stock_of_equal_models_is_that_model_and_at_right_angles_the_base(world: World) -> None:
    same = with_models(world, world.base, *[world.tuned["t1"]] * 3)
    assert_same(merged(same, "model_stock"), world.tuned["t1"], atol=1e-6)
    for second in ([0.0, 1], [-1.0, 0], [-3.0, 1], [0.0, 0]):
        other = with_models(
            world, {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 0])}, {"w": torch.tensor(second)}
        )
        assert_same(merged(other, "model_stock"), {"w": torch.zeros(2)}, atol=1e-7)


def test_model_stock_takes_at_least_two_models(world: World) -> None:
    with pytest.raises(UsageError, match="`model_stock` merges at least 2 models, got 1"):
        merged(world, "model_stock", ["t1"])
