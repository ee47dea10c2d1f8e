"""TIES is four different things in four programs: each test says whose it holds ours to."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.conftest import World, assert_same
from tests.methods.reference._weights import floats
from tests.methods.reference.ties import ties
from tests.support.merging import merged, with_integers, with_models

AGGREGATES = ("sum", "mean", "max")
TRIMS = ("model", "tensor", "fusion_bench")


@pytest.mark.parametrize(("aggregate", "trim"), list(itertools.product(AGGREGATES, TRIMS)))
@pytest.mark.parametrize("density", [0.2, 0.03, 0.9])
def test_ties_equals_ties_on_whole_task_vectors(
    world: World, aggregate: str, trim: str, density: float
) -> None:
    want = ties(world.base, list(world.tuned.values()), 0.7, density, aggregate, trim)
    got = merged(world, "ties", scaling_factor=0.7, density=density, aggregate=aggregate, trim=trim)
    assert_same(got, with_integers(want, world), atol=1e-6)


def test_the_paper_keeps_a_fifth_of_all_entries_and_fusion_bench_one_more(world: World) -> None:
    entries = sum(value.numel() for value in floats(world.base).values())
    for trim, more in (("model", 0), ("fusion_bench", 1)):
        got = merged(world, "ties", ["t1"], scaling_factor=1, density=0.2, trim=trim)
        changed = sum(int((got[name] != world.base[name]).sum()) for name in floats(world.base))
        assert changed == int(entries * 0.2) + more


def test_values_that_cancel_become_zero_or_follow_the_majority(world: World) -> None:
    base = {"w": torch.zeros(6)}
    plus, minus = torch.tensor([1.0, 1, 1, 2, 3, 4]), torch.tensor([-1.0, -1, 1, 2, 3, 4])
    other = with_models(world, base, {"w": plus}, {"w": minus})
    got = merged(other, "ties", scaling_factor=1, density=1)
    assert got["w"].tolist() == [0, 0, 2, 4, 6, 8]
    got = merged(other, "ties", scaling_factor=1, density=1, zero_sign="majority")
    assert got["w"].tolist() == [1, 1, 2, 4, 6, 8]
    negative = with_models(world, base, {"w": -plus}, {"w": -minus})
    got = merged(negative, "ties", scaling_factor=1, density=1, zero_sign="majority")
    assert got["w"].tolist() == [-1, -1, -2, -4, -6, -8]


def test_one_task_with_every_entry_kept_is_that_task(world: World) -> None:
    for trim in TRIMS:
        got = merged(world, "ties", ["t1"], scaling_factor=1, density=1, trim=trim)
        assert_same(got, world.tuned["t1"], atol=1e-6)


def test_agreeing_signs_with_every_entry_kept_give_the_average(world: World) -> None:
    tuned = [
        {k: v + (i + 1) * v.abs() if v.is_floating_point() else v for k, v in world.base.items()}
        for i in range(3)
    ]
    other = with_models(world, world.base, *tuned)
    got = merged(other, "ties", scaling_factor=1, density=1, aggregate="mean")
    assert_same(got, merged(other, "average"), atol=2e-6)


def test_entries_that_tie_with_the_smallest_kept_one_are_kept(world: World) -> None:
    other = with_models(world, {"w": torch.zeros(10)}, {"w": torch.tensor([5.0, 1, 1, 1, 1, 1, 0, 0, 0, 0])})
    got = merged(other, "ties", scaling_factor=1, density=0.2)
    assert got["w"].tolist() == [5, 1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_a_density_that_keeps_no_entry_gives_the_base(world: World) -> None:
    assert_same(merged(world, "ties", density=1e-9), world.base)
