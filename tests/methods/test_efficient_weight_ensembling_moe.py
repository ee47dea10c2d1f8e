"""E-WEMoE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergecli.methods.efficient_weight_ensembling_moe import above_quantile, kept_of
from tests.methods.reference.efficient_weight_ensembling_moe import efficient_weight_ensembling_moe
from tests.support.adapted_world import VISION
from tests.support.exact_clip import ExactClip
from tests.support.routed_tower import METHODS, learns_and_routes_like, mixture

pytestmark = pytest.mark.usefixtures("own_store")
METHOD = "efficient_weight_ensembling_moe"


@pytest.mark.parametrize("routing", ["batch", "sample"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"density": 0.5, "position_encoding": 6}, {"density": 1.0, "shared_router": False}],
)
def test_learning_and_logits_equal_those_of_one_image_after_another(
    clip: ExactClip, tmp_path: Path, settings: dict[str, Any], routing: str
) -> None:
    learns_and_routes_like(efficient_weight_ensembling_moe, clip, tmp_path, METHOD, routing, **settings)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("entries", [1, 2, 7, 100, 1001])
def test_pruning_keeps_what_torch_quantile_leaves(density: float, entries: int) -> None:
    magnitudes = torch.rand(entries, generator=torch.Generator().manual_seed(entries)) + 0.1
    want = magnitudes > torch.quantile(magnitudes, 1 - density) if density < 1 else magnitudes > 0
    got = above_quantile(magnitudes, density)
    assert torch.equal(got, want)
    assert int(got.sum()) <= kept_of(entries, density)


def test_equal_entries_are_cut_off_together() -> None:
    assert int(above_quantile(torch.ones(10), 0.5).sum()) == 0


def test_what_is_cut_off_takes_no_room(clip: ExactClip, tmp_path: Path) -> None:
    sizes = {each: mixture(clip, tmp_path, each, steps=0).stat().st_size for each in METHODS}
    values = load_file(tmp_path / "mixture.safetensors")
    kept = values[f"experts.{VISION}encoder.layers.0.mlp.fc1.weight"]
    assert kept.shape == (3, kept_of(16 * 32, 0.1)) == (3, 52)
    assert sizes[METHOD] < sizes[METHODS[0]]
