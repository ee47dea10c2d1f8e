"""Task singular vectors, merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import World, assert_same
from tests.methods.reference.tsv_m import tsv_m
from tests.support.layered_world import layered_world
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize("tasks", [1, 2, 3, 13])
def test_tsv_m_equals_full_decompositions_in_float64(tmp_path: Path, tasks: int) -> None:
    world = layered_world(tmp_path, tasks)
    want = tsv_m(world.base, list(world.tuned.values()), 0.9)
    assert_same(merged(world, "tsv_m", scaling_factor=0.9), with_integers(want, world), atol=1e-6)


def test_one_task_is_that_task(layered: World) -> None:
    assert_same(merged(layered, "tsv_m", ["t1"]), layered.tuned["t1"], atol=2e-6)


def test_repeated_tasks_and_tasks_equal_to_the_base_change_nothing(layered: World) -> None:
    """Two tasks of rank 2, each given twice among one that is zero: the sum of the two, as if they were alone."""
    base = {"w": torch.zeros(12, 10)}
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(n, 4, generator=generator))[0] for n in (12, 10))
    one, two = (
        {"w": left[:, i : i + 2] @ torch.diag(torch.tensor([3.0, 2])) @ right[:, i : i + 2].T} for i in (0, 2)
    )
    other = with_models(layered, base, one, one, base, two, two)
    assert_same(merged(other, "tsv_m"), {"w": one["w"] + two["w"]}, atol=2e-6)
