"""Queries, keys and values of a layer merged as one matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergecli.merging.sweep_points import merge_sweep, points_of
from mergecli.methods._fused import stacks
from tests.conftest import Weights, World, assert_same
from tests.support.merging import merged, same_bytes, with_models

PARTS = [f"layers.0.self_attn.{part}_proj.weight" for part in "kqv"]
"""As sorted files have them: keys before queries."""


@pytest.fixture
def attention(tmp_path: Path) -> World:
    """Models with an attention, and a weight and a bias beside it."""

    def weights(seed: int) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        shapes = {**dict.fromkeys(PARTS, (6, 6)), "layers.0.fc.weight": (4, 6), PARTS[0][:-6] + "bias": (6,)}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    base = weights(0)
    tuned = [{name: base[name] + 0.1 * each for name, each in weights(seed).items()} for seed in (1, 2, 3)]
    return with_models(World(tmp_path, base, {}), base, *tuned)


def stacked(weights: Weights) -> Weights:
    """The same with one matrix in place of three, queries first."""
    rest = {name: each for name, each in weights.items() if name not in PARTS}
    return {**rest, "layers.0.self_attn.qkv_proj.weight": torch.cat([weights[PARTS[i]] for i in (1, 0, 2)])}


@pytest.mark.parametrize("tasks", [["t1"], ["t1", "t2", "t3"]])
def test_a_fused_merge_is_that_of_the_stacked_matrix_taken_apart(
    attention: World, tmp_path: Path, tasks: list[str]
) -> None:
    fused = merged(attention, "dc_merge", tasks, density=0.2)
    (tmp_path / "other").mkdir()
    models = [stacked(each) for each in attention.tuned.values()]
    other = with_models(World(tmp_path / "other", {}, {}), stacked(attention.base), *models)
    same_bytes(stacked(fused), merged(other, "dc_merge", tasks, density=0.2, fuse_qkv=False))


def test_without_fusing_each_is_merged_by_itself(attention: World) -> None:
    one, three = (merged(attention, "dc_merge", density=1.0, fuse_qkv=fused) for fused in (True, False))
    assert not torch.allclose(one[PARTS[0]], three[PARTS[0]], atol=1e-4)
    assert one["layers.0.fc.weight"].equal(three["layers.0.fc.weight"])


def test_a_sweep_over_fusing_gives_the_same_as_single_merges(attention: World, tmp_path: Path) -> None:
    models = {name: str(path) for name, path in attention.files.items()}
    points = points_of(
        models, ["method.fuse_qkv=true,false"], base=str(attention.base_file), method="dc_merge", changes=[]
    )
    written = merge_sweep(points, tmp_path / "swept")
    for each, fused in zip(written, (True, False), strict=True):
        same_bytes(load_file(each.path), merged(attention, "dc_merge", fuse_qkv=fused))


def test_a_modifier_of_a_fused_merge_gets_fused_matrices_too(attention: World) -> None:
    plain = merged(attention, "dc_merge")
    got = merged(attention, "lines", of={"name": "dc_merge"}, first_layer=0.5, increase=0.0)
    half = {name: (attention.base[name] + plain[name]) / 2 for name in plain}
    assert_same(got, half, atol=1e-6)


def test_only_three_matrices_of_one_shape_are_stacked() -> None:
    shapes = dict.fromkeys(PARTS, (6, 6))
    name = "layers.0.self_attn.qkv_proj.weight"
    assert list(stacks(shapes)) == [(name, (PARTS[1], PARTS[0], PARTS[2]))]
    for odd in ({**shapes, PARTS[2]: (3, 6)}, dict.fromkeys(PARTS[:2], (6, 6)), dict.fromkeys(PARTS, (6,))):
        assert list(stacks(odd)) == [(each, ()) for each in odd]
