"""Concrete task arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import assert_same
from tests.methods.reference.concrete_task_arithmetic import concrete_task_arithmetic
from tests.support.adapted_world import AdaptedWorld
from tests.support.exact_clip import ExactClip
from tests.support.learned_merge import agrees, learned

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_concrete_task_arithmetic_is_adam_through_the_mask(
    clip: ExactClip, tmp_path: Path, temperature: float
) -> None:
    """What was learned once serves every mask: it is learned with the first."""
    for mask in ("sample", "expected", "discrete"):
        settings: dict[str, Any] = {
            "steps": 3,
            "learning_rate": 1e-2,
            "temperature": temperature,
            "mask": mask,
        }
        got = learned(clip.world, tmp_path, "concrete_task_arithmetic", **settings)
        want = concrete_task_arithmetic(clip.sight(), clip.world.base, clip.world.tuned, **settings)
        agrees(got, want, 1e-2, 1e-5)


def test_a_mask_that_is_zero_everywhere_is_the_base(adapted_world: AdaptedWorld, tmp_path: Path) -> None:
    settings = {"steps": 2, "initial_logits": -1000.0}
    tower, _ = learned(adapted_world, tmp_path, "concrete_task_arithmetic", **settings)
    assert_same(tower, adapted_world.base)
