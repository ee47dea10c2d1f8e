"""LiNeS and SVC on top of other methods; DARE is in `test_entries.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergecli.methods._layers import depths, layer_of
from tests.conftest import Weights, World, assert_same
from tests.golden import naive, naive_more, naive_spectral
from tests.support.merging import merged, with_models
from tests.support.layered_world import MATRICES, layered_world

DEPTHS = {
    "embeddings.position_embedding.weight": 0, "embeddings.patch.weight": 0, "encoder.layers.0.fc.weight": 0,
    "encoder.layers.0.fc.bias": 0, "encoder.layers.1.fc.weight": 0.5, "encoder.layers.1.norm.weight": 0.5,
    "encoder.layers.2.out.weight": 1, "post_layernorm.weight": 1, "empty": 0, "scale": 0,
}  # fmt: skip


@pytest.fixture
def layered(tmp_path: Path) -> World:
    return layered_world(tmp_path)


def with_steps(weights: Weights, world: World) -> Weights:
    return {**weights, "steps": world.base["steps"]}


def test_depth_is_read_from_the_names_of_several_libraries() -> None:
    assert depths(DEPTHS) == DEPTHS
    assert layer_of("vision_model.encoder.layers.11.mlp.fc1.weight") == 11
    assert layer_of("visual.transformer.resblocks.3.ln_1.weight") == 3
    assert layer_of("blocks.7.norm1.weight") == 7
    assert layer_of("vision_model.pre_layrnorm.weight") is None
    found = depths(
        ["vision_model.pre_layrnorm.weight", "vision_model.encoder.layers.0.a", "vision_model.encoder.layers.4.a",
         "vision_model.post_layernorm.bias", "visual.proj", "visual.ln_post.weight", "head.weight", "norm.weight",
         "visual.conv1.weight", "visual.class_embedding"]
    )  # fmt: skip
    assert list(found.values()) == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert depths(["layers.0.a", "b"]) == {"layers.0.a": 0, "b": 0}


@pytest.mark.parametrize("of", ["task_arithmetic", "ties", "average", "iso_c"])
def test_lines_equals_the_naive_scaling_of_what_a_method_merges(layered: World, of: str) -> None:
    inner = merged(layered, of)
    want = naive_more.lines(layered.base, inner, {k: float(v) for k, v in DEPTHS.items()}, 0.4, 1.2)
    got = merged(layered, "lines", of={"name": of}, first_layer=0.4, increase=1.2)
    assert_same(got, with_steps(want, layered), atol=2e-6)


def test_lines_at_its_ends_is_the_method_itself_or_the_base(layered: World) -> None:
    assert_same(merged(layered, "lines", first_layer=1, increase=0), merged(layered, "task_arithmetic"))
    assert_same(merged(layered, "lines", first_layer=0, increase=0), layered.base, atol=1e-6)


@pytest.mark.parametrize(
    ("of", "alpha"),
    [("task_arithmetic", 0.1), ("iso_c", 0.1), ("tsv_m", 1.0), ("average", 0.1), ("ties", 0.1)],
)
def test_svc_equals_the_naive_calibration_of_what_a_method_merges(
    layered: World, of: str, alpha: float
) -> None:
    inner = merged(layered, of)
    want = naive_spectral.svc(layered.base, list(layered.tuned.values()), inner, alpha)
    got = merged(layered, "svc", of={"name": of}, least_overlap=alpha)
    assert_same(got, with_steps(want, layered), atol=2e-6)


def test_svc_undoes_the_scale_of_one_task_and_of_repeated_ones(layered: World) -> None:
    """Where all tasks are one, u^T D / u^T tau is the scale itself, and is divided out."""
    one = layered.tuned["t1"]
    for count in (1, 3):
        same = with_models(layered, layered.base, *[one] * count)
        got = merged(same, "svc", of={"name": "task_arithmetic", "scaling_factor": 0.7})
        assert_same({n: got[n] for n in MATRICES}, {n: one[n] for n in MATRICES}, atol=2e-6)


def test_svc_leaves_what_is_no_matrix_as_it_was_merged(layered: World) -> None:
    got, inner = (
        merged(layered, "svc"),
        naive.task_arithmetic(layered.base, list(layered.tuned.values()), 0.3),
    )
    others = [name for name in inner if name not in MATRICES]
    assert_same({n: got[n] for n in others}, {n: inner[n] for n in others}, atol=1e-6)


def test_modifiers_of_modifiers_are_methods_too(layered: World) -> None:
    tower = {"name": "dare", "drop_rate": 0.5, "of": {"name": "ties", "density": 0.5}}
    got = merged(layered, "svc", of={"name": "lines", "first_layer": 1.0, "increase": 0.0, "of": tower})
    assert_same(got, merged(layered, "svc", of=tower), atol=1e-6)
