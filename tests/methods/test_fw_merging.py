"""FW-Merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergecli.methods import SettingsError, create
from tests.conftest import assert_same
from tests.methods.reference.fw_merging import fw_merging, fw_merging_soft
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


def test_the_soft_variant_moves_to_learned_mixtures_round_by_round(clip: ExactClip, tmp_path: Path) -> None:
    world = clip.world
    settings = {"variant": "soft", "steps": 3, "adam_steps": 4, "adam_rate": 0.05}
    tower, found = learned(world, tmp_path, "fw_merging", **settings)
    sight = clip.sight(tuple(CLASSES), "train").of_experts(world.tuned)
    want = fw_merging_soft(sight, world.base, world.tuned, rounds=3, steps=4, rate=0.05)
    torch.testing.assert_close(
        found["trace.entropies"].double(), torch.tensor(want.entropies).double(), atol=1e-3, rtol=0
    )
    names = [name for name in want.merged if not name.endswith("k_proj.bias")]
    apart = {name: (tower[name].double() - want.merged[name]).abs().max() for name in names}
    moved = {name: (want.merged[name] - world.base[name].double()).abs().max() for name in names}
    assert all(apart[name] < 2e-3 * moved[name] for name in names)


def test_settings_of_the_other_variant_are_refused() -> None:
    with pytest.raises(SettingsError) as caught:
        create("fw_merging", {"variant": "soft", "learning_rate": 0.5, "granularity": "task"}, ("a",))
    assert caught.value.problems == (("learning_rate", 'is for `variant = "hard"`'),)
    with pytest.raises(SettingsError) as caught:
        create("fw_merging", {"adam_steps": 5, "adam_rate": 0.001}, ("a",))
    assert caught.value.problems == (("adam_steps", 'is for `variant = "soft"`'),)


def test_its_first_round_is_adamerging(adapted_world: AdaptedWorld, tmp_path: Path) -> None:
    settings = {"objective": "experts", "split": "train"}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    soft, _ = learned(
        adapted_world, tmp_path / "a", "fw_merging", variant="soft", steps=1, adam_steps=5, **settings
    )
    ada, _ = learned(adapted_world, tmp_path / "b", "ada_merging", steps=5, **settings)
    assert_same(soft, ada, 1e-7)


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"steps": 3, "learning_rate": 0}, {"steps": 0, "variant": "soft"}, {"steps": 1, "adam_steps": 2, "adam_rate": 0, "variant": "soft"}],
)  # fmt: skip
def test_steps_of_no_size_are_task_arithmetic(
    adapted_world: AdaptedWorld, tmp_path: Path, settings: dict[str, Any]
) -> None:
    tower, _ = learned(adapted_world, tmp_path, "fw_merging", **settings)
    assert_same(tower, task_arithmetic(adapted_world.base, adapted_world.tuned, 0.3), 1e-6)
