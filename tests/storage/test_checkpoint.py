from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import canonical_names, open_checkpoint
from mergecli.storage.safetensors_format import TORCH_NAMES
from tests.conftest import World, assert_same

TOWER = ["embeddings.class_embedding", "pre_layrnorm.weight", "encoder.layers.0.mlp.fc1.weight"]


def test_every_tensor_reads_as_safetensors_itself_reads_it(world: World) -> None:
    with open_checkpoint(world.base_file) as checkpoint:
        assert_same({name: checkpoint.read(name) for name in checkpoint.entries}, load_file(world.base_file))


@pytest.mark.parametrize("dtype", sorted(set(TORCH_NAMES.values())))
def test_every_dtype_of_the_format_is_read(tmp_path: Path, dtype: str) -> None:
    value = torch.tensor([0, 1, 1, 0], dtype=torch.uint8).to(getattr(torch, dtype))
    save_file({"x": value}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        got = checkpoint.read("x")
    assert got.dtype == value.dtype
    assert bytes(got.view(torch.uint8).numpy()) == bytes(value.view(torch.uint8).numpy())


def test_a_block_of_entries_is_that_part_of_the_flattened_tensor(world: World) -> None:
    with open_checkpoint(world.base_file) as checkpoint:
        got = checkpoint.read_entries("conv", 5, 37)
    assert got.equal(world.base["conv"].reshape(-1)[5:37])


def test_shards_a_folder_and_one_file_hold_the_same_and_have_the_same_digest(world: World) -> None:
    folder = world.folder / "sharded"
    folder.mkdir()
    names = sorted(world.base)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, part in shards.items():
        save_file({name: world.base[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    plain = world.folder / "plain"
    plain.mkdir()
    save_file(world.base, plain / "model.safetensors")
    digests: set[str] = set()
    for path in (world.base_file, folder, folder / "model.safetensors.index.json", plain):
        with open_checkpoint(path) as checkpoint:
            assert_same({name: checkpoint.read(name) for name in checkpoint.entries}, world.base)
            digests.add(checkpoint.digest())
    assert len(digests) == 1


def test_the_digest_depends_on_a_value_a_name_a_shape_and_a_dtype(tmp_path: Path) -> None:
    variants = [
        {"a": torch.zeros(4)},
        {"a": torch.tensor([0, 0, 0, 1e-45])},
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
    ]
    digests: set[str] = set()
    for number, variant in enumerate(variants):
        save_file(variant, tmp_path / f"{number}.safetensors")
        with open_checkpoint(tmp_path / f"{number}.safetensors") as checkpoint:
            digests.add(checkpoint.digest())
    assert len(digests) == len(variants)


def test_the_digest_is_the_same_whether_tensors_were_read_before_in_parts_or_not(world: World) -> None:
    with open_checkpoint(world.base_file) as fresh, open_checkpoint(world.base_file) as used:
        for start, stop in ((0, 10), (100, 110), (0, 2000), (1000, 3000), (3000, 5000), (0, 5000)):
            used.read_entries("zz.long", start, stop)
        used.read_entries("conv", 3, 9)
        assert used.digest() == fresh.digest()


def test_keys_of_a_flat_vision_tower_get_their_prefix_and_position_ids_are_left_out() -> None:
    prefixed = {f"vision_model.{name}" for name in TOWER}
    assert set(canonical_names([*TOWER, "embeddings.position_ids"]).values()) == prefixed
    assert set(canonical_names([*prefixed, "vision_model.embeddings.position_ids"]).values()) == prefixed


def test_keys_of_a_flat_tower_of_a_siglip_get_their_prefix_too() -> None:
    tower = ["embeddings.patch_embedding.weight", "head.probe", "post_layernorm.weight"]
    assert list(canonical_names(tower).values()) == [f"vision_model.{name}" for name in tower]
    assert canonical_names(tower[:1]) == {tower[0]: tower[0]}


@pytest.mark.parametrize(
    "lead",
    [
        "module.",
        "model.",
        "wrapper._orig_mod.",
        "backbone.",
        "clip.",
        "module.model.clip.",
        "image_encoder.model.",
        "net.0.",
    ],
)
@pytest.mark.parametrize("inner", ["", "vision_model."])
def test_a_tower_inside_of_any_module_gets_its_own_names(lead: str, inner: str) -> None:
    other = f"{lead}text_model.x" if inner else "classifier.weight"
    got = canonical_names([*(lead + inner + name for name in TOWER), other])
    assert list(got.values()) == [
        *(f"vision_model.{name}" for name in TOWER), "text_model.x" if inner else "classifier.weight",
    ]  # fmt: skip


def test_wrappers_of_torch_are_taken_out_wherever_they_stand() -> None:
    names = [
        "layers.0._orig_mod.fc.weight",
        "_fsdp_wrapped_module.layers.1._checkpoint_wrapped_module.fc.weight",
    ]
    assert list(canonical_names(names).values()) == ["layers.0.fc.weight", "layers.1.fc.weight"]
    assert list(canonical_names(["a_orig_mod.x", "module.y"]).values()) == ["a_orig_mod.x", "module.y"]


@pytest.mark.parametrize(
    "names",
    [
        [
            *(f"student.vision_model.{name}" for name in TOWER),
            *(f"teacher.vision_model.{name}" for name in TOWER),
        ],
        ["x.weight", "_orig_mod.x.weight"],
        [*(f"model.vision_model.{name}" for name in TOWER), "logit_scale", "model.logit_scale"],
    ],
    ids=["two towers", "two of one name", "two scales"],
)
def test_names_stay_where_two_tensors_would_become_one(names: list[str]) -> None:
    assert canonical_names(names) == {name: name for name in names}


def test_keys_of_any_other_architecture_stay_as_they_are() -> None:
    names = ["model.embed_tokens.weight", "encoder.layers.0.weight"]
    assert canonical_names(names) == {name: name for name in names}


def test_the_vision_tower_of_a_whole_clip_leaves_out_the_text_tower(tmp_path: Path) -> None:
    names = [
        "vision_model.embeddings.class_embedding",
        "text_model.embeddings.token_embedding.weight",
        "logit_scale",
    ]
    save_file({name: torch.ones(2) for name in names}, tmp_path / "clip.safetensors")
    with open_checkpoint(tmp_path / "clip.safetensors") as checkpoint:
        assert checkpoint.is_whole_clip
        assert list(checkpoint.vision().entries) == names[:1]


def test_two_shards_with_one_tensor_are_refused(tmp_path: Path) -> None:
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.ones(2)}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    )
    with pytest.raises(InputError, match="`x` stand in more than one shard"):
        open_checkpoint(tmp_path)


def test_what_was_learned_of_a_tower_keeps_its_names(tmp_path: Path) -> None:
    names = [f"logits.vision_model.{name}" for name in TOWER]
    for metadata, want in (({"mergecli": "1"}, "logits.vision_model."), ({}, "vision_model.")):
        save_file({name: torch.ones(2) for name in names}, tmp_path / "x.safetensors", metadata)
        with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
            assert all(name.startswith(want) for name in checkpoint.entries)
