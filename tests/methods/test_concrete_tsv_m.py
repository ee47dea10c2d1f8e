"""Concrete TSV-M."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import assert_same
from tests.methods.reference.concrete_tsv_m import concrete_tsv_m
from tests.methods.reference.tsv_m import tsv_m
from tests.support.adapted_world import AdaptedWorld
from tests.support.exact_clip import ExactClip
from tests.support.learned_merge import agrees, learned

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.mark.parametrize("mask", ["sample", "expected"])
def test_concrete_tsv_m_is_adamw_through_the_mask_over_what_tsv_m_merges(
    clip: ExactClip, tmp_path: Path, mask: str
) -> None:
    settings: dict[str, Any] = {"steps": 3, "learning_rate": 1e-2, "mask": mask, "weight_decay": 0.5}
    got = learned(clip.world, tmp_path, "concrete_tsv_m", **settings)
    want = concrete_tsv_m(clip.sight(), clip.world.base, clip.world.tuned, **settings)
    agrees(got, want, 1e-2, 2e-5)


def test_a_mask_that_is_one_everywhere_is_tsv_m(adapted_world: AdaptedWorld, tmp_path: Path) -> None:
    tower, _ = learned(
        adapted_world, tmp_path, "concrete_tsv_m", steps=0, initial_logits=1000.0, scaling_factor=0.7
    )
    assert_same(tower, tsv_m(adapted_world.base, adapted_world.tuned, 0.7), 1e-5)
