"""AdaRank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergecli.merging.merge import merge
from tests.conftest import assert_same
from tests.methods.reference.ada_rank import ada_rank
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.support.adapted_world import CLASSES, AdaptedWorld, learn
from tests.support.exact_clip import ExactClip
from tests.support.learned_merge import learned
from tests.support.merging import same_bytes

pytestmark = pytest.mark.usefixtures("own_store")

CASES: list[dict[str, Any]] = [
    {},
    {"center": "mean", "initial_rank_ratio": 0.3, "start": 2.3},
    {"objective": "experts", "initial_rank_ratio": 0.5},
]


@pytest.mark.parametrize("settings", CASES, ids=["base", "mean", "experts"])
def test_ada_rank_is_adam_through_full_decompositions(
    clip: ExactClip, tmp_path: Path, settings: dict[str, Any]
) -> None:
    world, rate = clip.world, 3e-2
    tower, kept = learned(world, tmp_path, "ada_rank", steps=6, learning_rate=rate, **settings)
    sight = clip.sight(tuple(CLASSES))
    if "objective" in settings:
        sight = sight.of_experts(world.tuned)
    want = ada_rank(
        sight, world.base, world.tuned, steps=6, learning_rate=rate, start=settings.get("start", 0.3),
        ratio=settings.get("initial_rank_ratio", 1.0), center=settings.get("center", "base"),
    )  # fmt: skip
    entropies = torch.tensor(want.entropies)
    assert (kept["trace.entropies"] - entropies).abs().max() < 1e-4
    masks = {name: kept[f"kept.{name}"].double() for name in want.logits}
    changed = sum(int((masks[name] != want.logits[name]).sum()) for name in masks)
    total = sum(each.numel() for each in masks.values())
    assert changed <= 0.01 * total, "a logit that ends at 0 within rounding may fall to either side"
    first = 0.3 if settings.get("initial_rank_ratio") == 0.3 else settings.get("initial_rank_ratio", 1.0)
    began = sum(int(each.shape[1] * first) * len(CLASSES) for each in masks.values())
    assert sum(float(each.sum()) for each in masks.values()) != began, "ranks were learned"
    if not changed:
        names = [name for name in want.merged if not name.endswith("k_proj.bias")]
        assert_same(
            {name: tower[name].double() for name in names},
            {name: want.merged[name] for name in names},
            1e-4,
        )


def test_without_steps_it_is_task_arithmetic(adapted_world: AdaptedWorld, tmp_path: Path) -> None:
    tower, _ = learned(adapted_world, tmp_path, "ada_rank", steps=0)
    assert_same(tower, task_arithmetic(adapted_world.base, adapted_world.tuned, 0.3), 1e-5)


def test_without_steps_around_the_mean_it_adds_the_leading_parts_of_each_difference(
    adapted_world: AdaptedWorld, tmp_path: Path
) -> None:
    settings = {"center": "mean", "initial_rank_ratio": 0.3, "start": 2.0, "steps": 0}
    tower, kept = learned(adapted_world, tmp_path, "ada_rank", **settings)
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    models = [model[name].double() for model in adapted_world.tuned]
    want = middle = sum(models) / len(models)
    for model in models:
        left, values, right = torch.linalg.svd(model - middle, full_matrices=False)
        k = int(len(values) * 0.3)
        want = want + 2.0 * left[:, :k] @ values[:k].diag() @ right[:k]
    torch.testing.assert_close(tower[name].double(), want, atol=1e-5, rtol=0)
    assert float(kept[f"kept.{name}"].sum()) == len(models) * k


def test_what_was_learned_is_applied_again_to_the_same_bytes(
    adapted_world: AdaptedWorld, tmp_path: Path
) -> None:
    settings = {"steps": 4, "learning_rate": 5e-2, "initial_rank_ratio": 0.5}
    tower, _ = learned(adapted_world, tmp_path, "ada_rank", **settings)
    again = tmp_path / "again.safetensors"
    merge(
        adapted_world.recipe, method="ada_rank", coefficients=tmp_path / "learned.safetensors", output=again
    )
    same_bytes(load_file(again), tower)


def test_factors_are_not_written(adapted_world: AdaptedWorld, tmp_path: Path) -> None:
    learn(adapted_world, tmp_path, "ada_rank")
    keys = load_file(tmp_path / "learned.safetensors").keys()
    assert all(key.startswith(("kept.", "trace.")) or key == "coefficients" for key in keys)
