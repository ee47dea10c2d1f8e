"""PWE-MoE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergecli.merging.merge import merge
from mergecli.methods.pwe_moe import places
from mergecli.runtime.errors import UsageError
from mergecli.storage.store import home
from tests.conftest import assert_same
from tests.methods.reference.pwe_moe import pwe_moe
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.support.adapted_world import CLASSES, AdaptedWorld
from tests.support.exact_clip import ExactClip
from tests.support.learned_merge import learned

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.mark.parametrize("settings", [{}, {"preference": [1.0, 3.0, 0.0], "split": "test"}])
def test_routers_are_learned_as_autograd_and_torchs_own_adam_do(
    clip: ExactClip, tmp_path: Path, settings: dict[str, Any]
) -> None:
    world, rate = clip.world, {"steps": 5, "learning_rate": 1e-2}
    tower, found = learned(world, tmp_path, "pwe_moe", **rate, **settings)
    sight = clip.sight(tuple(CLASSES), settings.get("split", "train")).of_experts(world.tuned)
    want = pwe_moe(sight, world.base, world.tuned, **rate, preference=settings.get("preference", ()))
    torch.testing.assert_close(
        found["trace.entropies"].double(), torch.tensor(want.entropies).double(), atol=2e-4, rtol=0
    )
    assert_same({name: each.double() for name, each in tower.items()}, want.merged, 1e-4)
    assert (found["router.1.bias"] - 0.3).abs().max() > 0.01


@pytest.mark.parametrize("preference", [[], [0.0, 1.0, 0.0]])
def test_no_steps_are_task_arithmetic_for_every_preference(
    adapted_world: AdaptedWorld, tmp_path: Path, preference: list[float]
) -> None:
    settings = {"steps": 0, "router_spread": 0.0, "preference": preference}
    tower, _ = learned(adapted_world, tmp_path, "pwe_moe", **settings)
    assert_same(tower, task_arithmetic(adapted_world.base, adapted_world.tuned, 0.3), 1e-6)


def test_one_learning_serves_all_preferences_also_from_a_file(
    adapted_world: AdaptedWorld, tmp_path: Path
) -> None:
    given = {"steps": 2, "start": 0.5, "learning_rate": 0.1, "router_spread": 1.0}
    first, one = learned(adapted_world, tmp_path, "pwe_moe", **given, preference=[1, 0, 0])
    kept = (tmp_path / "learned.safetensors").read_bytes()
    second, _ = learned(adapted_world, tmp_path, "pwe_moe", **given, preference=[0, 0, 1])
    even, other = learned(adapted_world, tmp_path, "pwe_moe", **given)
    assert (tmp_path / "learned.safetensors").read_bytes() == kept
    assert len(list((home() / "coefficients" / "pwe_moe").glob("*.safetensors"))) == 1
    name = next(name for name in first if ".mlp.fc1.weight" in name)
    assert not first[name].equal(second[name])
    assert not first[name].equal(even[name])
    assert sorted(one) == sorted(other)
    output = tmp_path / "again.safetensors"
    again: dict[str, Any] = {
        "method": "pwe_moe",
        "coefficients": tmp_path / "learned.safetensors",
        "output": output,
    }
    merge(adapted_world.recipe, settings={"preference": [0, 0, 2]}, **again)
    assert_same(load_file(output), second)
    merge(adapted_world.recipe, **again)
    assert_same(load_file(output), even)


@pytest.mark.parametrize(
    ("preference", "problem"),
    [
        ([1.0], "expected one number for each of 3 models, got 1"),
        ([0.0, 0.0, 0.0], "expected numbers of at least 0, and one above"),
        ([1.0, -1.0, 1.0], "expected numbers of at least 0, and one above"),
    ],
)
def test_a_preference_that_does_not_fit_is_refused(
    adapted_world: AdaptedWorld, tmp_path: Path, preference: list[float], problem: str
) -> None:
    with pytest.raises(UsageError) as raised:
        learned(adapted_world, tmp_path, "pwe_moe", preference=preference)
    assert raised.value.message == f"settings: `method.preference`: {problem}"


def test_tensors_of_a_layers_attention_and_mlp_have_routers_and_no_others() -> None:
    names = ["embeddings.class_embedding", "l.0.layer_norm1.weight", "l.0.mlp.fc1.weight", "l.0.mlp.fc2.bias",
             "l.0.self_attn.q_proj.weight", "l.1.mlp.fc1.weight", "post_layernorm.weight"]  # fmt: skip
    assert places(names) == {names[2]: 0, names[3]: 0, names[4]: 1, names[5]: 2}
