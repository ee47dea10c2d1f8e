"""A checkpoint that is computed as it is read is like a file with that content."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecli.storage.checkpoint import Checkpoint, open_checkpoint
from mergecli.storage.lazy_checkpoint import LazyCheckpoint, lazy_checkpoint, rounded
from tests.conftest import World, assert_same


def doubled(base: Checkpoint, name: str, start: int, stop: int, into: Tensor) -> None:
    into.copy_(base.read_entries(name, start, stop) * 2)


def twice(base: Checkpoint, *names: str) -> LazyCheckpoint:
    return lazy_checkpoint(base, {name: partial(doubled, base, name) for name in names})


def read(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def test_computed_tensors_are_computed_and_the_others_are_the_bases(world: World) -> None:
    with twice(open_checkpoint(world.base_file), "conv", "scale", "empty") as seen:
        got = read(seen)
        assert seen.parameters == sum(tensor.numel() for tensor in world.base.values())
    changed = {name: world.base[name] * 2 for name in ("conv", "scale", "empty")}
    assert_same(got, {**world.base, **changed})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_rounded_checkpoint_is_that_of_rounded_weights_and_leaves_whole_numbers_alone(
    world: World, dtype: str
) -> None:
    want = {
        name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in world.base.items()
    }
    with rounded(open_checkpoint(world.base_file), dtype) as seen:
        assert_same(read(seen), want)


def test_rounding_to_its_own_dtype_is_the_checkpoint_itself(world: World) -> None:
    with open_checkpoint(world.base_file) as base:
        assert rounded(base, "float32") is base


def test_a_computed_tensor_is_rounded_once(world: World) -> None:
    save_file({"x": torch.full((3,), 1.0, dtype=torch.bfloat16)}, world.folder / "x.safetensors")

    def add(start: int, stop: int, into: Tensor) -> None:
        into.copy_(torch.full((stop - start,), 1 + 2**-20))

    with lazy_checkpoint(
        open_checkpoint(world.folder / "x.safetensors"), {"x": add}, dtype="float32"
    ) as seen:
        assert seen.read("x").equal(torch.full((3,), 1 + 2**-20))


def test_its_digest_is_that_of_a_file_with_the_same_content_read_before_or_not(world: World) -> None:
    with twice(open_checkpoint(world.base_file), "zz.long") as seen:
        save_file(read(seen), world.folder / "same.safetensors")
        after = seen.digest()
    with twice(open_checkpoint(world.base_file), "zz.long") as fresh:
        unread = fresh.digest()
    with open_checkpoint(world.folder / "same.safetensors") as file, open_checkpoint(world.base_file) as base:
        assert after == unread == file.digest() != base.digest()


def test_blocks_read_by_several_threads_are_parts_of_the_whole(world: World) -> None:
    pieces = [(start, min(start + 37, 5000)) for start in range(0, 5000, 37)]
    with twice(open_checkpoint(world.base_file), "zz.long") as seen, ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda piece: seen.read_entries("zz.long", *piece), pieces))
        fresh = seen.digest()
    with twice(open_checkpoint(world.base_file), "zz.long") as again:
        assert fresh == again.digest()
    assert torch.cat(parts).equal(world.base["zz.long"] * 2)


def test_entries_are_read_into_memory_that_is_given(world: World) -> None:
    into = torch.zeros(10)
    with twice(open_checkpoint(world.base_file), "zz.long") as seen:
        seen.read_entries("zz.long", 5, 9, into=into[3:7])
    assert into.equal(torch.cat([torch.zeros(3), world.base["zz.long"][5:9] * 2, torch.zeros(3)]))


def test_the_vision_tower_of_a_view_of_a_whole_clip_is_computed_too(tmp_path: Path) -> None:
    names = [
        "logit_scale",
        "text_model.embeddings.token_embedding.weight",
        "vision_model.embeddings.class_embedding",
    ]
    save_file({name: torch.ones(2) for name in names}, tmp_path / "clip.safetensors")
    with twice(open_checkpoint(tmp_path / "clip.safetensors"), names[2]) as seen:
        assert_same(read(seen.vision()), {names[2]: torch.full((2,), 2.0)})
        tower = seen.vision().digest()
    save_file({names[2]: torch.full((2,), 2.0)}, tmp_path / "tower.safetensors")
    with open_checkpoint(tmp_path / "tower.safetensors") as file:
        assert tower == file.digest()
        assert load_file(tmp_path / "tower.safetensors").keys() == file.entries.keys()


def test_closing_a_view_closes_what_it_reads(world: World) -> None:
    base = open_checkpoint(world.base_file)
    with twice(base, "conv"):
        pass
    with pytest.raises(OSError, match="descriptor"):
        base.close()
