"""Spherical interpolation between two models."""

from __future__ import annotations

import pytest
import torch

from mergecli.runtime.errors import UsageError
from tests.conftest import World, assert_same, random_weights
from tests.methods.reference.slerp import slerp
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("t", [0, 0.3, 0.5, 1])
def test_slerp_equals_the_great_circle_in_float64(world: World, t: float, far: bool) -> None:
    """Between models around one base, and models that have little to do with each other."""
    models = [random_weights(11), random_weights(12)] if far else [world.tuned["t1"], world.tuned["t2"]]
    got = merged(with_models(world, world.base, *models), "slerp", t=t)
    assert_same(got, with_integers(slerp(models, t), world), atol=2e-6)
    if t in (0, 1):
        assert_same(got, models[int(t)], atol=1e-6)


def test_slerp_keeps_the_norm_of_models_of_one_norm(world: World) -> None:
    one, other = (random_weights(seed)["zz.long"] for seed in (11, 12))
    two = with_models(world, {"w": one}, {"w": one / one.norm()}, {"w": other / other.norm()})
    assert abs(float(merged(two, "slerp", t=0.3)["w"].norm()) - 1) < 1e-6


def test_slerp_to_a_tensor_without_direction_and_between_opposite_ones_is_the_line(world: World) -> None:
    vector = torch.tensor([3.0, 4])
    for second in (torch.zeros(2), -vector):
        two = with_models(world, {"w": vector}, {"w": vector}, {"w": second})
        want = 0.75 * vector + 0.25 * second
        assert_same(merged(two, "slerp", t=0.25), {"w": want}, atol=1e-6)


def test_slerp_takes_two_models(world: World) -> None:
    with pytest.raises(UsageError, match="`slerp` merges exactly 2 models, got 3"):
        merged(world, "slerp")
