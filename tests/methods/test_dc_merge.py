"""DC-Merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergecli.methods._base import Group
from mergecli.methods.dc_merge import DcMerge
from tests.conftest import assert_same
from tests.methods.reference.dc_merge import dc_matrix, dc_merge
from tests.support.layered_world import layered_world
from tests.support.merging import merged, with_integers


@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("density", [1e-3, 0.3, 1.0])
def test_dc_merge_equals_full_decompositions_in_float64(tmp_path: Path, tasks: int, density: float) -> None:
    world = layered_world(tmp_path, tasks)
    want = dc_merge(world.base, list(world.tuned.values()), 0.9, density)
    got = merged(world, "dc_merge", scaling_factor=0.9, density=density)
    assert_same(got, with_integers(want, world), atol=2e-6)


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(*deltas: Tensor, **settings: Any) -> Tensor:
    """tau of one matrix."""
    rows = torch.stack([delta.float() for delta in deltas])
    names = tuple(f"t{number}" for number in range(len(deltas)))
    group = Group("layers.0.fc.weight", torch.zeros(rows.shape[1:]), rows, (True,) * len(rows), names)
    return DcMerge(**settings).merge(group).double()


@pytest.mark.parametrize(("smoothing", "smooth"), [("mean", 1.0), ("linear", 3.0), ("linear", 1e6)])
def test_singular_values_are_smoothed_to_their_mean_or_a_line(smoothing: str, smooth: float) -> None:
    deltas = [some(9, 8, seed=seed) for seed in (1, 2)]
    got = solved(*deltas, density=1.0, rank=4, smoothing=smoothing, steepness=smooth)
    assert torch.allclose(got, dc_matrix(deltas, 1.0, 4, smooth), atol=2e-6)
    alone = torch.linalg.svdvals(
        solved(deltas[0], density=1.0, rank=4, smoothing=smoothing, steepness=smooth)
    )
    assert float(alone[:4].sum()) == pytest.approx(float(torch.linalg.svdvals(deltas[0])[:4].sum()), rel=1e-5)


def test_one_task_with_all_entries_is_that_task() -> None:
    delta = some(6, 4)
    assert torch.allclose(solved(delta, density=1.0), delta, atol=1e-6)


def test_tasks_with_orthogonal_spaces_are_added_cut_to_their_ranks() -> None:
    left, right = torch.linalg.qr(some(8, 8)).Q, torch.linalg.qr(some(8, 8, seed=1)).Q
    one, two = (left[:, p] @ some(4, 4, seed=2 + n) @ right[p] for n, p in enumerate((slice(4), slice(4, 8))))
    # each core has 16 entries in its own block; in the others it has rounding, which must not count as agreeing
    assert torch.allclose(solved(one, two, density=0.25), one + two, atol=1e-5)


def test_rotations_of_rows_and_columns_are_passed_on() -> None:
    deltas = [some(6, 5, seed=seed) for seed in (1, 2)]
    rows, columns = torch.linalg.qr(some(6, 6)).Q, torch.linalg.qr(some(5, 5, seed=9)).Q
    want = rows @ solved(*deltas, density=0.3) @ columns
    assert torch.allclose(solved(*[rows @ d @ columns for d in deltas], density=0.3), want, atol=1e-5)


def test_the_rank_is_at_most_that_of_all_blocks() -> None:
    deltas = [some(9, 7, seed=seed) for seed in (1, 2, 3)]
    values = torch.linalg.svdvals(solved(*deltas, density=1.0))
    assert int((values > 1e-5 * values[0]).sum()) <= 6


def test_a_task_equal_to_the_base_only_takes_its_share_of_the_ranks() -> None:
    deltas = [some(8, 8, seed=seed) for seed in (1, 2)]
    want = solved(*deltas, density=1.0, rank=2)
    assert torch.allclose(solved(*deltas, torch.zeros(8, 8), density=1.0, rank=2), want, atol=1e-6)
