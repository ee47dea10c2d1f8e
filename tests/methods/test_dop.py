"""DOP."""

from __future__ import annotations

import pytest

from tests.conftest import World, assert_same
from tests.methods.reference.dop import dop
from tests.support.layered_world import MATRICES
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize("balance", ["min_norm", "fixed"])
def test_dop_equals_autograd_with_torchs_own_adam(layered: World, balance: str) -> None:
    want = dop(layered.base, list(layered.tuned.values()), 20, 1e-3, balance)
    got = merged(layered, "dop", steps=20, learning_rate=1e-3, balance=balance)
    assert_same(got, with_integers(want, layered), atol=2e-6)


def test_awkward_shapes_are_merged_too(world: World) -> None:
    want = dop(world.base, list(world.tuned.values()), 5, 1e-3, "fixed")
    got = merged(world, "dop", steps=5, learning_rate=1e-3, balance="fixed")
    assert_same(got, with_integers(want, world), atol=2e-6)


def test_a_model_that_is_merged_again_changes_nothing(layered: World) -> None:
    twice = with_models(layered, layered.base, layered.tuned["t1"], layered.tuned["t1"])
    assert_same(merged(twice, "dop", steps=20), layered.tuned["t1"])


def test_without_steps_it_is_the_mean_of_the_merge_so_far_and_the_new_model(layered: World) -> None:
    one, two, three = layered.tuned.values()
    want = {name: ((one[name] + two[name]) / 2 + three[name]) / 2 for name in MATRICES}
    got = merged(layered, "dop", steps=0)
    assert_same({name: got[name] for name in MATRICES}, want, atol=1e-6)
