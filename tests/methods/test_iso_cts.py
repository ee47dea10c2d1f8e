"""Isotropic merging in common and task-specific subspaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import World, assert_same
from tests.methods.reference.iso_cts import iso_cts
from tests.support.layered_world import layered_world
from tests.support.merging import merged, with_integers


@pytest.mark.parametrize(("tasks", "common_space"), [(1, 0.5), (2, 0.8), (3, 0.3), (3, 1.0), (4, 0.0)])
def test_iso_cts_equals_full_decompositions_in_float64(
    tmp_path: Path, tasks: int, common_space: float
) -> None:
    world = layered_world(tmp_path, tasks)
    want = iso_cts(world.base, list(world.tuned.values()), 1.1, common_space)
    got = merged(world, "iso_cts", scaling_factor=1.1, common_space=common_space)
    assert_same(got, with_integers(want, world), atol=1e-6)


def test_iso_cts_with_only_common_directions_is_iso_c(layered: World) -> None:
    assert_same(merged(layered, "iso_cts", common_space=1), merged(layered, "iso_c"), atol=1e-6)
