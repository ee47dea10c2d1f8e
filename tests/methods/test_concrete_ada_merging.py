"""Concrete AdaMerging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import assert_same
from tests.methods.reference.concrete_ada_merging import concrete_ada_merging
from tests.support.adapted_world import AdaptedWorld
from tests.support.exact_clip import ExactClip
from tests.support.learned_merge import agrees, learned

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.mark.parametrize("order", ["corrected", "published"])
@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_concrete_ada_merging_is_two_descents_and_then_adam(
    clip: ExactClip, tmp_path: Path, granularity: str, order: str
) -> None:
    settings: dict[str, Any] = {
        "granularity": granularity, "order": order, "mask_steps": 3, "steps": 3, "learning_rate": 1e-2,
        "mask_rate": 1e-2, "inner_rate": 0.05,
    }  # fmt: skip
    got = learned(clip.world, tmp_path, "concrete_ada_merging", **settings)
    want = concrete_ada_merging(clip.sight(), clip.world.base, clip.world.tuned, **settings)
    agrees(got, want, 1e-2, 1e-4)


def test_the_experts_labels_take_the_place_of_the_entropy(clip: ExactClip, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "granularity": "task", "mask_steps": 2, "steps": 2, "learning_rate": 1e-2, "mask_rate": 1e-2,
        "inner_rate": 0.05,
    }  # fmt: skip
    got = learned(clip.world, tmp_path, "concrete_ada_merging", objective="experts", **settings)
    sight = clip.sight().of_experts(clip.world.tuned)
    agrees(got, concrete_ada_merging(sight, clip.world.base, clip.world.tuned, **settings), 1e-2, 1e-4)


def test_concrete_ada_merging_under_a_mask_of_ones_is_ada_merging(
    adapted_world: AdaptedWorld, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": 4, "learning_rate": 1e-2}
    plain, _ = learned(adapted_world, tmp_path, "ada_merging", **settings)
    settings |= {"mask_steps": 0, "initial_logits": 60.0}
    masked, _ = learned(adapted_world, tmp_path, "concrete_ada_merging", **settings)
    assert_same(masked, plain, 1e-5)
