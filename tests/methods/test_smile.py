"""SMILE upscaling."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from mergecli import methods
from mergecli.clip.model import load_clip
from mergecli.methods._smile_layers import SmileLinear
from tests.conftest import assert_same
from tests.methods.reference.smile import smile
from tests.support.mixture_files import towers
from tests.support.smile_tower import LAYERS, Tower, inputs, tuned_towers, upscaled
from tests.support.tiny_clip import make_tiny_clip


@pytest.mark.parametrize(
    ("rank", "gate_rank", "experts"), [(4, 1, 1), (4, 3, 2), (99, 1, 1), (5, 2, 3), (3, 1, 9)]
)
@torch.no_grad()
def test_smile_equals_smile_token_by_token(rank: int, gate_rank: int, experts: int) -> None:
    tower = Tower(1)
    base, tuned = {k: v.clone() for k, v in tower.state_dict().items()}, tuned_towers(3, tower)
    settings = {"rank": rank, "gate_rank": gate_rank, "experts_per_token": experts}
    installed = upscaled(tower, tuned, "vision_model.", **settings)
    for model in (base, *tuned):
        model["mlp.fc2.bias"] = torch.zeros(6)
    for layer in LAYERS:
        module = tower.get_submodule(layer)
        assert isinstance(module, SmileLinear)
        x = torch.randn(4, 7, module.in_features, generator=torch.Generator().manual_seed(4))
        want, routes = smile(base, tuned, layer, x, rank, gate_rank, experts)
        assert float((module(x) - want).abs().max()) < 5e-6
        assert float((installed.routes()[layer] - routes.mean(1)).abs().max()) < 1e-6


@pytest.mark.parametrize("tasks", [1, 3])
@torch.no_grad()
def test_smile_of_equal_tasks_and_full_rank_is_their_tower(tasks: int) -> None:
    tower, tuned_tower = Tower(1), Tower(1)
    tuned = tuned_towers(1, tower)
    tuned_tower.load_state_dict(tuned[0])
    upscaled(tower, tuned * tasks, average_others=True)
    assert float((tower(inputs()) - tuned_tower(inputs())).abs().max()) < 1e-5
    assert_same(towers("smile", Tower(1).state_dict(), tuned, average_others=True)[0], tuned[0], atol=1e-6)


def test_smile_needs_a_gate_within_its_rank() -> None:
    with pytest.raises(methods.SettingsError) as caught:
        methods.create("smile", {"rank": 2, "gate_rank": 3}, ("t1",))
    assert caught.value.problems == (("gate_rank", "expected at most `rank`, 2, got 3"),)


@torch.no_grad()
def test_smile_routes_the_linear_layers_of_a_clip_tower(tmp_path: Path) -> None:
    tower = load_clip(make_tiny_clip(tmp_path)).tower
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    tuned, tuned_tower = tuned_towers(1, tower), copy.deepcopy(tower)
    linear = {name: value for name, value in tuned[0].items() if "_proj" in name or ".fc" in name}
    tuned_tower.load_state_dict(linear, strict=False)
    installed = upscaled(tower, tuned, "vision_model.")
    got = tower(pixels)
    assert float((got - tuned_tower(pixels)).abs().max()) < 1e-5
    ends = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{each}_proj" for each in ("k", "out", "q", "v")))
    assert sorted(installed.routes()) == [f"encoder.layers.{n}.{each}" for n in (0, 1) for each in ends]
