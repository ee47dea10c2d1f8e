"""Reading in blocks and threads changes nothing."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecli.merging import models as reading
from mergecli.merging.merge import merge
from mergecli.merging.models import open_models
from mergecli.methods._base import Group, Unit
from mergecli.recipe.reading import recipe_of
from mergecli.storage.checkpoint import open_checkpoint
from tests.conftest import World, assert_same


def opened(world: World, stack: ExitStack) -> reading.Models:
    return open_models(recipe_of(world.files, base=world.base_file), stack, needs="base")


@pytest.mark.parametrize("block", [1, 7, 100, 1 << 18])
def test_blocks_cover_every_entry_once_and_in_order(
    world: World, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(reading, "BLOCK", block)
    with ExitStack() as stack:
        parts = list(opened(world, stack).map(lambda start, group: (group.name, start, group.tuned.clone())))
    for name, want in world.base.items():
        if want.is_floating_point():
            mine = [(start, rows) for part, start, rows in parts if part == name]
            assert [start for start, _ in mine] == sorted(start for start, _ in mine)
            got = torch.cat([rows for _, rows in mine], dim=1)
            assert got.equal(torch.stack([model[name].reshape(-1) for model in world.tuned.values()]))


def test_whole_tensors_have_their_shape(world: World) -> None:
    with ExitStack() as stack:
        shapes = dict(opened(world, stack).map(lambda _, group: (group.name, group.shape), unit=Unit.TENSOR))
    assert shapes == {name: value.shape for name, value in world.base.items() if value.is_floating_point()}


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties"])
def test_block_size_processors_and_threads_change_no_byte(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    contents: set[bytes] = set()
    for block, processors, threads in ((1 << 18, 2, 2), (64, 1, 1), (1000, 8, 4), (1 << 18, 5, 1)):
        monkeypatch.setattr(reading, "BLOCK", block)
        monkeypatch.setattr(os, "cpu_count", lambda count=processors: count)
        torch.set_num_threads(threads)
        output = world.folder / "m.safetensors"
        merge(world.files, base=world.base_file, method=method, output=output)
        contents.add(output.read_bytes())
    assert len(contents) == 1


def test_sharded_inputs_change_no_byte(world: World) -> None:
    output = world.folder / "m.safetensors"
    merge(world.files, base=world.base_file, method="ties", output=output)
    folder = world.folder / "sharded" / "t1"
    folder.mkdir(parents=True)
    names = sorted(world.tuned["t1"])
    for number, part in enumerate((names[4:], names[:4])):
        save_file({name: world.tuned["t1"][name] for name in part}, folder / f"{number}.safetensors")
    where = {name: f"{int(name in names[:4])}.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    again = world.folder / "again.safetensors"
    merge(world.files | {"t1": folder}, base=world.base_file, method="ties", output=again)
    with open_checkpoint(output) as one, open_checkpoint(again) as other:
        assert one.digest() == other.digest()
        assert one.metadata["inputs"] == other.metadata["inputs"]


def test_a_merge_hashes_its_inputs_on_the_way(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = merge(world.files, base=world.base_file, method="ties", output=world.folder / "m.safetensors")
    for name, file in world.files.items():
        with open_checkpoint(file) as fresh:
            assert merged.inputs[name] == fresh.digest()
    with ExitStack() as stack:
        models = opened(world, stack)
        list(models.map(lambda _, group: group.name))
        models.tuned["t1"].read("steps")
        reads: list[int] = []
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda *given: reads.append(1) or preadv(*given))
        models.tuned["t1"].digest()
        assert reads == []


def test_a_sample_takes_about_one_entry_in_so_many_of_every_tensor(tmp_path: Path) -> None:
    base = {"large": torch.arange(1_000_000.0), "small": torch.arange(700.0), "tiny": torch.ones(3)}
    save_file(base, tmp_path / "base.safetensors")
    with ExitStack() as stack:
        models = open_models(recipe_of({"a": tmp_path / "base.safetensors"}), stack, needs="weights")
        sampled: dict[str, list[float]] = {name: [] for name in base}
        for name, values in models.map(lambda _, group: (group.name, group.tuned[0].tolist()), 64):
            sampled[name] += values
    assert [len(sampled[name]) for name in base] == [pytest.approx(1_000_000 / 64, rel=0.01), 11, 1]
    spread = torch.tensor(sampled["large"])
    assert spread.mean() == pytest.approx(500_000, rel=0.02)
    assert set(sampled["large"]) <= set(base["large"].tolist())


def test_inputs_of_several_dtypes_are_merged_in_float32(world: World) -> None:
    kinds = {"t1": torch.float16, "t2": torch.bfloat16, "t3": torch.float64}
    for name, kind in kinds.items():
        cast = {k: v.to(kind) if v.is_floating_point() else v for k, v in world.tuned[name].items()}
        save_file(cast, world.files[name])
    merge(world.files, base=world.base_file, method="average", output=world.folder / "m.safetensors")
    want = {
        key: sum(world.tuned[name][key].to(kind).float() for name, kind in kinds.items()) / 3
        for key, value in world.base.items()
        if value.is_floating_point()
    }
    got = load_file(world.folder / "m.safetensors")
    assert_same({k: v for k, v in got.items() if k != "steps"}, want, atol=1e-6)  # type: ignore[arg-type]


def test_a_base_that_the_method_does_not_need_is_not_read(world: World) -> None:
    merged = merge(world.files, base=world.base_file, method="average", output=world.folder / "m.safetensors")
    assert list(merged.inputs) == ["t1", "t2", "t3"]


@pytest.mark.parametrize("block", [1, 7, 96, 1 << 18])
def test_blocks_of_rows_are_whole_rows_in_order(
    world: World, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(reading, "BLOCK", block)

    def look(start: int, group: Group) -> tuple[str, int, Tensor]:
        return group.name, start, group.tuned.clone()

    with ExitStack() as stack:
        parts = list(opened(world, stack).map(look, unit=Unit.ROW))
    for name, want in world.base.items():
        if want.is_floating_point():
            mine = [(start, rows) for part, start, rows in parts if part == name]
            row = want[0].numel() if want.dim() > 1 and len(want) else 1
            assert all(start % row == 0 for start, _ in mine)
            assert len(mine) == 1 or want.dim() > 1  # a vector is one row
            got = torch.cat([rows for _, rows in mine], dim=1) if want.dim() else mine[0][1]
            assert got.equal(torch.stack([model[name] for model in world.tuned.values()]))


def test_blocks_of_rows_change_no_byte_of_a_merge(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    contents: set[bytes] = set()
    for block in (1, 96, 1 << 18):
        monkeypatch.setattr(reading, "BLOCK", block)
        output = world.folder / "m.safetensors"
        merge(world.files, base=world.base_file, method="della", output=output)
        contents.add(output.read_bytes())
    assert len(contents) == 1
