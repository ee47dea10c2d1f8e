"""Isotropic merging in the common subspace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import World, assert_same
from tests.methods.reference.iso_c import iso_c
from tests.support.layered_world import MATRICES, layered_world
from tests.support.merging import merged, with_integers


@pytest.mark.parametrize("tasks", [1, 3, 13])
def test_iso_c_equals_full_decompositions_in_float64(tmp_path: Path, tasks: int) -> None:
    world = layered_world(tmp_path, tasks)
    want = iso_c(world.base, list(world.tuned.values()), 1.5)
    assert_same(merged(world, "iso_c", scaling_factor=1.5), with_integers(want, world), atol=1e-6)


def test_all_singular_values_are_equal_and_have_the_summed_ones_mean(layered: World) -> None:
    got = merged(layered, "iso_c")
    for name in MATRICES:
        summed = sum(model[name] - layered.base[name] for model in layered.tuned.values())
        mean = torch.linalg.svdvals(summed).mean()
        assert float((torch.linalg.svdvals(got[name] - layered.base[name]) - mean).abs().max()) < 1e-5
