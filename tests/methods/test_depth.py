"""How deep in the network a tensor lies."""

from __future__ import annotations

from mergecli.methods._depth import depths, layer_of, parts_of
from tests.support.layered_world import DEPTHS


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


def test_parts_follow_each_other_as_in_the_network() -> None:
    names = ["post_layernorm.bias", "layers.10.a", "layers.2.a", "embeddings.weight"]
    assert parts_of(names) == {
        "embeddings.weight": "before", "layers.2.a": "2", "layers.10.a": "10", "post_layernorm.bias": "after",
    }  # fmt: skip
    assert [*parts_of(names)] == ["embeddings.weight", "layers.2.a", "layers.10.a", "post_layernorm.bias"]
