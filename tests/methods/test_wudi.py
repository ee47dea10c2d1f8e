"""WUDI-Merging."""

from __future__ import annotations

import pytest

from mergecli.runtime.errors import UsageError
from tests.conftest import Weights, World, assert_same
from tests.methods.reference.wudi import wudi
from tests.support.layered_world import MATRICES
from tests.support.merging import merged, with_integers, with_models


def test_wudi_equals_autograd_with_torchs_own_adam(layered: World) -> None:
    want = wudi(layered.base, list(layered.tuned.values()), 60, 1e-3)
    got = merged(layered, "wudi", steps=60, learning_rate=1e-3)
    assert_same(got, with_integers(want, layered), atol=1e-5)


def test_one_task_is_that_task(layered: World) -> None:
    assert_same(merged(layered, "wudi", ["t1"]), layered.tuned["t1"], atol=2e-6)


def test_a_task_equal_to_the_base_changes_no_matrix(layered: World) -> None:
    tuned = list(layered.tuned.values())
    want = merged(layered, "wudi", steps=20)
    got = merged(with_models(layered, layered.base, layered.base, *tuned), "wudi", steps=20)
    assert_same({n: got[n] for n in MATRICES}, {n: want[n] for n in MATRICES}, atol=1e-6)


def test_wudi_without_steps_is_task_arithmetic_on_matrices_and_lowers_its_loss(layered: World) -> None:
    def loss(name: str, weights: Weights) -> float:
        deltas = [model[name] - layered.base[name] for model in layered.tuned.values()]
        moved = weights[name] - layered.base[name]
        return sum(float(((moved - d) @ d.T).square().sum() / d.square().sum()) for d in deltas)

    start = merged(layered, "wudi", steps=0)
    sums = merged(layered, "task_arithmetic", scaling_factor=1)
    assert_same({n: start[n] for n in MATRICES}, {n: sums[n] for n in MATRICES}, atol=1e-6)
    ended = merged(layered, "wudi", steps=200, learning_rate=1e-3)
    assert all(loss(name, ended) < 0.7 * loss(name, start) for name in MATRICES)


def test_a_learning_rate_that_would_leave_float32_is_refused(world: World) -> None:
    with pytest.raises(UsageError, match="expected a number at least 0, got 1e\\+299"):
        merged(world, "wudi", learning_rate=1e299)
