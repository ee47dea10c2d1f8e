"""What learning holds in memory, known before it begins."""

from __future__ import annotations

from typing import cast

import pytest

from mergecli import methods
from mergecli.merging.learning.expected import held_bytes
from mergecli.methods._adapted import Adapted

SHAPES = {
    "vision_model.encoder.layers.0.mlp.fc1.weight": (400, 100),
    "vision_model.encoder.layers.0.mlp.fc1.bias": (400,),
    "vision_model.encoder.layers.0.mlp.fc2.weight": (100, 400),
    "vision_model.encoder.layers.0.mlp.fc2.bias": (100,),
    "vision_model.encoder.layers.0.self_attn.q_proj.weight": (400, 100),
}
MLP, TOWER = 80_500, 120_500


@pytest.mark.parametrize(
    ("name", "settings", "least", "most"),
    [
        ("ada_merging", {}, TOWER * 9, TOWER * 9),
        ("ada_merging", {"vectors": "bfloat16"}, TOWER * 5, TOWER * 5),
        ("weight_ensembling_moe", {}, 2 * TOWER + 8 * MLP, 2 * TOWER + 9 * MLP),
        ("rank_one_moe", {}, 2 * TOWER + 8 * 32 * 2 * 500, 2 * TOWER + 8 * 32 * 2 * 500 + MLP),
    ],
)
def test_of_a_tower_that_routes_only_what_routes_is_held_for_each_task(
    name: str, settings: dict[str, object], least: int, most: int
) -> None:
    method = cast(Adapted, methods.create(name, settings))
    assert 4 * least <= held_bytes(method, SHAPES, 8) <= 4 * most
