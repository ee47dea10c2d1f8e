from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.atomic import refuse_inputs, whole_file, whole_folder, write_text
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.safetensors_writer import SafetensorsWriter
from tests.conftest import World, assert_same


def copied(source: Path, target: Path, metadata: dict[str, str], block: int, backwards: bool = False) -> None:
    with open_checkpoint(source) as checkpoint:
        layout = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.entries.items()}
        names = sorted(layout, reverse=backwards)
        with SafetensorsWriter(target, layout, metadata) as writer:
            for name in names:
                count = checkpoint.entries[name].size
                for start in range(0, max(count, 1), block):
                    writer.write(name, checkpoint.read_entries(name, start, min(start + block, count)), start)


@pytest.mark.parametrize(("block", "backwards"), list(itertools.product([1 << 20, 100], [False, True])))
def test_a_file_is_byte_for_byte_what_safetensors_writes_whatever_the_order_and_blocks(
    world: World, block: int, backwards: bool
) -> None:
    mixed = world.base | {
        "half": torch.ones(3, dtype=torch.float16), "brain": torch.ones(5, dtype=torch.bfloat16),
        "double": torch.ones(2, dtype=torch.float64), "bits": torch.tensor([True, False]), "naïve \"x\"": torch.ones(1),
    }  # fmt: skip
    theirs, ours = world.folder / "theirs.safetensors", world.folder / "ours.safetensors"
    save_file(mixed, theirs, metadata={"format": "pt"})
    copied(theirs, ours, {"format": "pt"}, block, backwards)
    assert ours.read_bytes() == theirs.read_bytes()


def test_metadata_is_written_in_one_order_and_can_be_completed_at_the_end(tmp_path: Path) -> None:
    layout = {"x": ("F32", (2,))}
    for name, metadata in (("a", {"b": "1", "a": "2"}), ("b", {"a": "2", "b": "1"})):
        with SafetensorsWriter(tmp_path / name, layout, metadata) as writer:
            writer.write("x", torch.ones(2))
            writer.describe({"a": "3", "b": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with open_checkpoint(tmp_path / "a") as checkpoint:
        assert checkpoint.metadata == {"a": "3", "b": "1"}
    assert_same(load_file(tmp_path / "a"), {"x": torch.ones(2)})


def test_a_tensor_that_was_not_written_is_noticed_and_nothing_is_left(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="not written whole"),
        SafetensorsWriter(tmp_path / "x.safetensors", {"x": ("F32", (2,)), "y": ("F32", (1,))}, {}) as writer,
    ):
        writer.write("x", torch.ones(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(failure), whole_file(target) as file:
        file.write(b"new")
        raise failure
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_new_file_replaces_the_old_one_and_its_folders_are_made(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "x.txt"
    write_text(target, "one")
    write_text(target, "two")
    assert target.read_text() == "two"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(ValueError, match="no"), whole_folder(target) as folder:
        (folder / "config.json").write_text("{}")
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []
    with whole_folder(target) as folder:
        (folder / "config.json").write_text("{}")
    assert [file.name for file in target.iterdir()] == ["config.json"]


def test_a_folder_that_exists_keeps_its_other_files(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (target / "config.json").write_text("old")
    with whole_folder(target) as folder:
        (folder / "config.json").write_text("new")
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "config.json").read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_an_output_that_is_an_input_is_refused_also_through_a_link(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    source.write_text("x")
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    for target in (source, link):
        with pytest.raises(UsageError, match=r"the output would replace an input \(t1\)"):
            refuse_inputs(target, {"t1": source})
    refuse_inputs(tmp_path / "new.safetensors", {"t1": source})


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"file/out.txt: cannot write: (not a directory|file exists)"):
        write_text(tmp_path / "file" / "out.txt", "text")
