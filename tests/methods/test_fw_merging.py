"""FW-Merging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import assert_same
from tests.methods.reference.fw_merging import fw_merging
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.support.adapted_world import CLASSES, AdaptedWorld
from tests.support.exact_clip import ExactClip
from tests.support.learned_merge import learned

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_fw_merging_moves_to_the_candidates_that_the_gradient_points_to(
    clip: ExactClip, tmp_path: Path, granularity: str
) -> None:
    world = clip.world
    settings = {"steps": 4, "learning_rate": 0.5, "granularity": granularity}
    tower, found = learned(world, tmp_path, "fw_merging", **settings)
    sight = clip.sight(tuple(CLASSES), "train").of_experts(world.tuned)
    want = fw_merging(sight, world.base, world.tuned, steps=4, gamma=0.5, granularity=granularity)
    torch.testing.assert_close(
        found["trace.entropies"].double(), torch.tensor(want.entropies).double(), atol=1e-4, rtol=0
    )
    names = [name for name in want.merged if not name.endswith("k_proj.bias")]
    assert_same(
        {name: tower[name].double() for name in names}, {name: want.merged[name] for name in names}, 2e-6
    )
    assert (found["coefficients"] - 0.3).abs().max() > 0.05


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 3, "learning_rate": 0}])
def test_steps_of_no_size_are_task_arithmetic(
    adapted_world: AdaptedWorld, tmp_path: Path, settings: dict[str, float]
) -> None:
    tower, _ = learned(adapted_world, tmp_path, "fw_merging", **settings)
    assert_same(tower, task_arithmetic(adapted_world.base, adapted_world.tuned, 0.3), 1e-6)
