"""Rank-One-MoE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergecli.methods._wemoe_layers import largest
from mergecli.storage.checkpoint import open_checkpoint
from tests.methods.reference.rank_one_moe import rank_one_moe
from tests.support.adapted_world import VISION
from tests.support.exact_clip import ExactClip
from tests.support.routed_tower import install, learns_and_routes_like, mixture

pytestmark = pytest.mark.usefixtures("own_store")
METHOD = "rank_one_moe"


@pytest.mark.parametrize(
    ("routing", "settings"),
    [("batch", {"rank": 3}), ("sample", {"rank": 2}), ("sample", {"rank": 3, "best_directions": 4})],
)
def test_learning_and_logits_equal_those_of_one_image_after_another(
    clip: ExactClip, tmp_path: Path, routing: str, settings: dict[str, Any]
) -> None:
    learns_and_routes_like(rank_one_moe, clip, tmp_path, METHOD, routing, **settings)


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_constant_weights_of_all_directions_are_task_arithmetic(
    clip: ExactClip, tmp_path: Path, routing: str
) -> None:
    path = mixture(clip, tmp_path, METHOD, steps=0, router_spread=0.0, rank=1000)
    tower, handle = install(clip, path, routing)
    plain = clip.tower()
    base, tuned = clip.world.base, clip.world.tuned
    for name, value in plain.state_dict().items():
        own = base[VISION + name].double()
        value.copy_(own + 0.3 * sum(model[VISION + name].double() - own for model in tuned))
    pixels = clip.pixels["test"]["one"]
    torch.testing.assert_close(tower(pixels).pooler_output, plain(pixels).pooler_output, atol=1e-5, rtol=0)
    routes = handle.routes()["encoder.layers.0.mlp"]
    assert routes.shape == (len(pixels) if routing == "sample" else 1, 3)
    torch.testing.assert_close(routes, torch.full_like(routes, 0.3))
    handle.remove()
    assert sorted(tower.state_dict()) == sorted(clip.tower().state_dict())


def test_the_file_holds_thin_factors_and_the_tower_of_a_task_has_its_directions(
    clip: ExactClip, tmp_path: Path
) -> None:
    path, name = mixture(clip, tmp_path, METHOD, steps=0, rank=2), f"{VISION}encoder.layers.0.mlp.fc1.weight"
    values = load_file(path)
    assert values[f"left.{name}"].shape == (3, 32, 2)
    assert values[f"right.{name}"].shape == (3, 2, 16)
    assert values[f"router.{VISION}encoder.layers.0.mlp.0.weight"].shape == (6, 16)
    base, tuned = clip.world.base[name].double(), clip.world.tuned[1][name].double()
    u, s, vh = torch.linalg.svd(tuned - base, full_matrices=False)
    from mergecli.formats.mixture import mixture_of

    with open_checkpoint(path) as stored:
        found = mixture_of(stored)
        got = found.method.weights(name, 1, stored.read)
    torch.testing.assert_close(got.double(), base + (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5, rtol=0)


def test_of_the_routing_weights_the_largest_count() -> None:
    shares = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    assert largest(shares, 0) is shares
    assert largest(shares, 4) is shares
    got = largest(shares, 2)
    torch.testing.assert_close(got, torch.tensor([[0.9, 0.0, 0.25, 0.0]]), atol=1e-6, rtol=0)
