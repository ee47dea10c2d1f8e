"""Model breadcrumbs."""

from __future__ import annotations

import pytest
import torch

from mergecli.runtime.errors import UsageError
from tests.conftest import World, assert_same
from tests.methods.reference.breadcrumbs import breadcrumbs
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize(("small", "large"), [(0.9, 0.01), (0.5, 0.2), (0, 0.3), (0.4, 0), (0.3, 0.7)])
def test_breadcrumbs_equal_breadcrumbs_of_sorted_tensors(world: World, small: float, large: float) -> None:
    want = breadcrumbs(world.base, list(world.tuned.values()), 0.7, small, large)
    got = merged(world, "breadcrumbs", scaling_factor=0.7, drop_smallest=small, drop_largest=large)
    assert_same(got, with_integers(want, world), atol=1e-6)


def test_breadcrumbs_that_drop_nothing_are_task_arithmetic(world: World) -> None:
    got = merged(world, "breadcrumbs", drop_smallest=0, drop_largest=0)
    assert_same(got, merged(world, "task_arithmetic"))


def test_breadcrumbs_that_drop_all_are_the_base_and_cannot_drop_more(world: World) -> None:
    assert_same(merged(world, "breadcrumbs", drop_smallest=1, drop_largest=0), world.base)
    with pytest.raises(UsageError, match="more than everything is dropped"):
        merged(world, "breadcrumbs", drop_smallest=0.9, drop_largest=0.2)


def test_breadcrumbs_that_drop_only_from_below_are_ties_of_one_task_by_tensor(world: World) -> None:
    got = merged(world, "breadcrumbs", ["t1"], drop_smallest=0.8, drop_largest=0, scaling_factor=1)
    ties = merged(world, "ties", ["t1"], density=0.2, trim="tensor", scaling_factor=1)
    for name in ("layer.0.weight", "zz.long"):
        assert_same({name: got[name]}, {name: ties[name]}, atol=1e-6)


def test_entries_that_tie_with_a_kept_one_are_kept(world: World) -> None:
    tied = torch.tensor([1.0, -1, 1, 2, 2, 2, 3, 3, 9, 9])
    other = with_models(world, {"w": torch.zeros(10)}, {"w": tied})
    got = merged(other, "breadcrumbs", drop_smallest=0.4, drop_largest=0.2, scaling_factor=1)
    assert got["w"].tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 0, 0]
