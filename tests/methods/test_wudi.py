"""WUDI-Merging."""

from __future__ import annotations

import pytest

from mergecli.runtime.errors import UsageError
from tests.conftest import Weights, World, assert_same
from tests.methods.reference.wudi import exact_wudi, swudi, wudi
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


@pytest.mark.parametrize("ridge", [1e-8, 0.1])
def test_the_ridge_solver_is_the_minimum_with_an_inverse(layered: World, ridge: float) -> None:
    want = exact_wudi(layered.base, list(layered.tuned.values()), ridge)
    assert_same(merged(layered, "wudi", solver="ridge", ridge=ridge), with_integers(want, layered), atol=2e-6)


@pytest.mark.parametrize(("rank", "time"), [(0, 0.0), (3, 0.0), (3, 7.0), (100, 0.5)])
def test_the_spectral_solver_is_a_filter_direction_by_direction(
    layered: World, rank: int, time: float
) -> None:
    want = swudi(layered.base, list(layered.tuned.values()), rank, time)
    got = merged(layered, "wudi", solver="spectral", rank=rank, time=time)
    assert_same(got, with_integers(want, layered), atol=2e-6)


def test_the_spectral_solver_with_every_direction_and_time_is_the_minimum_and_without_time_the_sum(
    layered: World,
) -> None:
    exact = merged(layered, "wudi", solver="ridge", ridge=0)
    assert_same(merged(layered, "wudi", solver="spectral", rank=100), exact, atol=2e-6)
    sums = merged(layered, "task_arithmetic", scaling_factor=1)
    got = merged(layered, "wudi", solver="spectral", time=1e-12)
    assert_same({n: got[n] for n in MATRICES}, {n: sums[n] for n in MATRICES}, atol=1e-6)


def test_long_descent_of_the_loss_comes_near_the_minimum(layered: World) -> None:
    def loss(solver: str, **settings: float) -> float:
        weights = merged(layered, "wudi", solver=solver, **settings)
        found = 0.0
        for name in MATRICES:
            deltas = [model[name] - layered.base[name] for model in layered.tuned.values()]
            moved = weights[name] - layered.base[name]
            found += sum(float(((moved - d) @ d.T).square().sum() / d.square().sum()) for d in deltas)
        return found

    least = loss("ridge")
    assert least <= loss("adam", steps=3000, learning_rate=1e-3) < 1.05 * least


@pytest.mark.parametrize("solver", ["ridge", "spectral"])
def test_a_solver_leaves_one_task_and_equal_tasks_as_they_are(layered: World, solver: str) -> None:
    assert_same(merged(layered, "wudi", ["t1"], solver=solver, rank=100), layered.tuned["t1"], atol=2e-6)
    twice = with_models(layered, layered.base, layered.tuned["t1"], layered.tuned["t1"])
    got = merged(twice, "wudi", solver=solver, rank=100)
    assert_same({n: got[n] for n in MATRICES}, {n: layered.tuned["t1"][n] for n in MATRICES}, atol=2e-6)
