"""WEMoE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.methods.reference.weight_ensembling_moe import weight_ensembling_moe
from tests.support.adapted_world import VISION
from tests.support.exact_clip import ExactClip
from tests.support.routed_tower import install, learns_and_routes_like, mixture

pytestmark = pytest.mark.usefixtures("own_store")
METHOD = "weight_ensembling_moe"


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_learning_and_logits_equal_those_of_one_image_after_another(
    clip: ExactClip, tmp_path: Path, routing: str
) -> None:
    learns_and_routes_like(weight_ensembling_moe, clip, tmp_path, METHOD, routing)


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_a_constant_router_is_task_arithmetic(clip: ExactClip, tmp_path: Path, routing: str) -> None:
    tower, _ = install(clip, mixture(clip, tmp_path, METHOD, steps=0, router_spread=0.0), routing)
    plain = clip.tower()
    base, tuned = clip.world.base, clip.world.tuned
    for name, value in plain.state_dict().items():
        own = base[VISION + name].double()
        value.copy_(own + 0.3 * sum(model[VISION + name].double() - own for model in tuned))
    pixels = clip.pixels["test"]["one"]
    torch.testing.assert_close(tower(pixels).pooler_output, plain(pixels).pooler_output, atol=1e-5, rtol=0)
