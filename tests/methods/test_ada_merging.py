"""AdaMerging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import assert_same
from tests.methods.reference.ada_merging import ada_merging
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.methods.reference.ties import ties
from tests.support.adapted_world import CLASSES, AdaptedWorld
from tests.support.exact_clip import ExactClip
from tests.support.learned_merge import agrees, learned

pytestmark = pytest.mark.usefixtures("own_store")

SETTINGS = [
    {"granularity": "task"},
    {"granularity": "layer"},
    {"granularity": "task", "clamp": True, "learning_rate": 0.3},
    {"granularity": "layer", "clamp": True, "learning_rate": 0.3},
    {"granularity": "task", "start": 0.7, "split": "train"},
    {"granularity": "layer", "preprocess": "ties", "density": 0.3},
    {"granularity": "task", "preprocess": "ties"},
    {"granularity": "layer", "adapt_on": ["three", "one"]},
    {"granularity": "layer", "objective": "experts"},
    {"granularity": "task", "objective": "experts", "split": "train", "adapt_on": ["two", "three"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: " ".join(map(str, each.values())))
def test_ada_merging_is_adam_through_the_merge(
    clip: ExactClip, tmp_path: Path, settings: dict[str, Any]
) -> None:
    world, settings = clip.world, {"steps": 6, "learning_rate": 1e-2, **settings}
    got = learned(world, tmp_path, "ada_merging", **settings)
    aside = ("split", "adapt_on", "preprocess", "density", "objective")
    other = {key: value for key, value in settings.items() if key not in aside}
    if "preprocess" in settings:
        other["density"] = settings.get("density", 0.2)
    sight = clip.sight(settings.get("adapt_on", tuple(CLASSES)), settings.get("split", "test"))
    if settings.get("objective") == "experts":
        sight = sight.of_experts(world.tuned)
    want = ada_merging(sight, world.base, world.tuned, **other)
    agrees(got, want, settings["learning_rate"], 2e-5 if "clamp" in settings else 2e-6)
    moved = got[1]["coefficients"] - settings.get("start", 0.3)
    assert float(moved.abs().max()) > 5e-3


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_no_steps_are_task_arithmetic(adapted_world: AdaptedWorld, tmp_path: Path, granularity: str) -> None:
    settings = {"steps": 0, "start": 0.4, "granularity": granularity}
    tower, kept = learned(adapted_world, tmp_path, "ada_merging", **settings)
    assert_same(tower, task_arithmetic(adapted_world.base, adapted_world.tuned, 0.4), 1e-6)
    assert kept["trace.entropies"].shape == (0, 3)


def test_no_steps_with_ties_add_what_ties_keeps(adapted_world: AdaptedWorld, tmp_path: Path) -> None:
    tower, _ = learned(adapted_world, tmp_path, "ada_merging", steps=0, preprocess="ties", density=0.3)
    assert_same(tower, ties(adapted_world.base, adapted_world.tuned, 0.3, 0.3, "sum"), 1e-6)


def test_vectors_in_bfloat16_are_learned_with_nearly_as_well(
    adapted_world: AdaptedWorld, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": 4, "learning_rate": 1e-2, "granularity": "task"}
    _, exact = learned(adapted_world, tmp_path, "ada_merging", **settings)
    _, short = learned(adapted_world, tmp_path, "ada_merging", vectors="bfloat16", **settings)
    apart = (exact["coefficients"] - short["coefficients"]).abs().max()
    assert 0 < apart < 4e-3, "a bfloat16 has eight bits, a step of Adam is 1e-2"
