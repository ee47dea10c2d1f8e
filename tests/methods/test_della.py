"""DELLA."""

from __future__ import annotations

import itertools

import pytest
import torch

from mergecli.runtime.errors import UsageError
from tests.conftest import World, assert_same
from tests.methods.reference.della import della
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize(("aggregate", "elect"), list(itertools.product(("mean", "sum"), (True, False))))
def test_della_equals_della_entry_by_entry(world: World, aggregate: str, elect: bool) -> None:
    want = della(world.base, list(world.tuned.values()), 0.8, 0.4, 0.3, aggregate, elect)
    got = merged(
        world, "della", scaling_factor=0.8, drop_rate=0.4, window=0.3, aggregate=aggregate, elect=elect
    )
    assert_same(got, with_integers(want, world), atol=2e-6)


def test_della_without_drops_is_ties_that_keeps_all_and_without_election_the_average(world: World) -> None:
    got = merged(world, "della", drop_rate=0, window=0)
    assert_same(got, merged(world, "ties", density=1, aggregate="mean", scaling_factor=1), atol=1e-6)
    got = merged(world, "della", drop_rate=0, window=0, elect=False)
    assert_same(got, merged(world, "average"), atol=2e-6)


def test_della_drops_small_entries_more_often(world: World) -> None:
    entries = torch.arange(1.0, 100_001)
    other = with_models(world, {"w": torch.zeros(100_000)}, {"w": entries})
    got = merged(other, "della", drop_rate=0.5, window=0.8)["w"]
    dropped = (got == 0).float()
    assert abs(float(dropped[:1000].mean()) - 0.896) < 0.05
    assert abs(float(dropped[-1000:].mean()) - 0.104) < 0.05
    assert abs(float(dropped.mean()) - 0.5) < 0.01
    assert abs(float(got.mean() / entries.mean()) - 1) < 0.02


def test_a_window_that_leaves_the_probabilities_is_refused(world: World) -> None:
    with pytest.raises(UsageError, match=r"`method.window`: half of it, 0.2, around `drop_rate` 0.1 leaves"):
        merged(world, "della", drop_rate=0.1, window=0.4)
