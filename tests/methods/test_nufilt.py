"""NUFILT."""

from __future__ import annotations

import torch

from mergecli.methods._base import uniform
from tests.conftest import Weights, World, assert_same
from tests.methods.reference.nufilt import nufilt
from tests.support.layered_world import MATRICES
from tests.support.merging import merged, with_integers


def random_starts(world: World) -> list[Weights]:
    """A of each model after the first, as the recipe's seed 0 gives it: normal numbers from the uniform ones of the method."""
    found: list[Weights] = []
    for task in list(world.tuned)[1:]:
        own: Weights = {}
        for name in MATRICES:
            columns = world.base[name].shape[1]
            drawn = uniform(0, name, task, 0, 64 * columns).double()
            own[name] = 0.02 * torch.distributions.Normal(0, 1).icdf(drawn).view(64, columns)
        found.append(own)
    return found


def test_nufilt_equals_autograd_with_torchs_own_adam(layered: World) -> None:
    want = nufilt(layered.base, list(layered.tuned.values()), random_starts(layered), 50, 1e-3)
    assert_same(merged(layered, "nufilt"), with_integers(want, layered), atol=2e-6)


def test_without_descent_nothing_changes_in_the_directions_that_are_used(layered: World) -> None:
    one, both = merged(layered, "nufilt", ["t1"]), merged(layered, "nufilt", ["t1", "t2"], steps=0)
    for name in MATRICES:
        before = (one[name] - layered.base[name]).double()
        used = torch.linalg.svd(before)[2][: before.shape[1] // 6].T
        added = (both[name] - one[name]).double()
        assert float((added @ used).abs().max()) < 1e-6
        assert float(added.abs().max()) > 1e-2


def test_descent_brings_the_new_model_back_on_what_it_needs(layered: World) -> None:
    without = merged(layered, "nufilt", ["t1", "t2"], steps=0)
    repaired = merged(layered, "nufilt", ["t1", "t2"], steps=200, learning_rate=1e-2)
    for name in MATRICES:
        new = (layered.tuned["t2"][name] - layered.base[name]).double()
        own = torch.linalg.svd(new)[2][:8].T
        errors = [
            float((((each[name] - layered.base[name]).double() - new) @ own).norm())
            for each in (without, repaired)
        ]
        assert errors[1] < 0.7 * errors[0]


def test_one_model_keeps_its_matrices_of_layers_and_all_else_is_the_base(layered: World) -> None:
    got = merged(layered, "nufilt", ["t1"])
    assert_same({n: got[n] for n in MATRICES}, {n: layered.tuned["t1"][n] for n in MATRICES}, atol=2e-7)
    others = got.keys() - set(MATRICES)
    assert_same({n: got[n] for n in others}, {n: layered.base[n] for n in others})
