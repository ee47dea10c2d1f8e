"""DARE under several other methods."""

from __future__ import annotations

import pytest
import torch

from mergecli.runtime.errors import UsageError
from tests.conftest import World, assert_same
from tests.methods.reference.average import average
from tests.methods.reference.dare import dare
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.methods.reference.ties import ties
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize(("drop_rate", "rescale"), [(0.5, True), (0.9, True), (0.3, False)])
def test_dare_equals_other_methods_on_whole_thinned_models(
    world: World, drop_rate: float, rescale: bool
) -> None:
    thin = dare(world.base, list(world.tuned.values()), drop_rate, rescale)
    wanted = {
        "task_arithmetic": task_arithmetic(world.base, thin, 0.3),
        "average": average(thin),
        "ties": ties(world.base, thin, 0.3, 0.2, "sum"),
    }
    for of, want in wanted.items():
        got = merged(world, "dare", of={"name": of}, drop_rate=drop_rate, rescale=rescale)
        assert_same(got, with_integers(want, world), atol=2e-6)


@pytest.mark.parametrize("of", ["task_arithmetic", "average", "ties", "tsv_m"])
def test_dare_that_drops_nothing_is_the_other_method(world: World, of: str) -> None:
    assert_same(merged(world, "dare", of={"name": of}, drop_rate=0), merged(world, of), atol=1e-6)


def test_dare_that_drops_all_is_refused(world: World) -> None:
    with pytest.raises(UsageError, match=r"`method.drop_rate`: expected a number in \[0, 1\), got 1"):
        merged(world, "dare", drop_rate=1)


@pytest.mark.parametrize(
    "of", [{"name": "dare"}, {"name": "della"}, {"name": "lines", "of": {"name": "della"}}]
)
def test_entries_are_not_dropped_twice_by_the_same_numbers(world: World, of: dict[str, object]) -> None:
    with pytest.raises(
        UsageError, match=r"`method\.of`: `(dare|della)` drops entries by the same random numbers"
    ):
        merged(world, "dare", of=of)


def test_dare_drops_the_stated_share_and_keeps_the_mean(world: World) -> None:
    base = {"w": torch.zeros(200_000)}
    other = with_models(world, base, {"w": torch.ones(200_000)})
    got = merged(other, "dare", drop_rate=0.8, of={"name": "task_arithmetic", "scaling_factor": 1})["w"]
    assert set(got.unique().tolist()) == {0.0, 5.0}
    assert abs(float((got == 0).float().mean()) - 0.8) < 0.005  # five standard deviations
