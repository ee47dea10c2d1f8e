"""ACE-Merging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import World, assert_same
from tests.methods.reference.ace_merging import ace_merging
from tests.methods.reference.average import average
from tests.support.layered_world import MATRICES, layered_world
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize("lengths", [[0.1, 0.1, 0.1], [1e-3, 0.1, 1.0]])
def test_ace_merging_equals_the_authors_formula(tmp_path: Path, lengths: list[float]) -> None:
    """With alike norms, and with norms so unlike that the spectrum is refined."""
    world = layered_world(tmp_path, 3, lengths)
    want = ace_merging(world.base, list(world.tuned.values()), 0.8, 0.01, 0.3, 0.5)
    got = merged(world, "ace_merging", scaling_factor=0.8, spectral_share=0.5)
    assert_same(got, with_integers(want, world), atol=1e-5)
    if lengths[0] != lengths[1]:
        bare = merged(world, "ace_merging", scaling_factor=0.8, spectral_share=0)
        assert float((bare[MATRICES[2]] - got[MATRICES[2]]).abs().max()) > 1e-3


def test_ace_merging_with_a_large_ridge_averages_the_centered_task_vectors(layered: World) -> None:
    got = merged(layered, "ace_merging", ridge=1e6, heterogeneity=1e9)
    centered = [
        {
            k: layered.base[k] + (d := v - layered.base[k]) - (d.mean(0) if k in MATRICES else 0)
            if v.is_floating_point() else v
            for k, v in model.items()
        }
        for model in layered.tuned.values()
    ]  # fmt: skip
    assert_same(got, with_integers(average(centered), layered), atol=2e-6)


def test_a_task_equal_to_the_base_changes_no_matrix(layered: World) -> None:
    tuned = list(layered.tuned.values())
    want = merged(layered, "ace_merging")
    got = merged(with_models(layered, layered.base, layered.base, *tuned), "ace_merging")
    assert_same({n: got[n] for n in MATRICES}, {n: want[n] for n in MATRICES}, atol=1e-6)


def test_a_matrix_that_cannot_be_inverted_has_a_pseudo_inverse(world: World) -> None:
    base, one = torch.zeros(4, 3), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    one[:, 1] = one[:, 0]
    other = with_models(world, {"w.weight": base}, {"w.weight": one}, {"w.weight": one * 2})
    assert bool(merged(other, "ace_merging", ridge=1e-300)["w.weight"].isfinite().all())
