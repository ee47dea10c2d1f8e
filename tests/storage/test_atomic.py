from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli.runtime.errors import InputError, MergecliWarning, UsageError
from mergecli.storage.atomic import (
    check_space,
    check_target,
    check_targets,
    refuse_inputs,
    warn_of_others,
    whole_file,
    whole_folder,
    write_text,
)
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


def test_ctrl_c_while_the_digest_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SafetensorsWriter(tmp_path / "x.safetensors", {"x": ("F32", (2,))}, {})
    monkeypatch.setattr(
        writer.hashes, "is_whole", lambda *_: signal.raise_signal(signal.SIGINT)
    )  # the writer stays, as in a traceback
    with pytest.raises(KeyboardInterrupt), writer:
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
    with (
        pytest.warns(MergecliWarning, match=r"model: has other files, which stay: `notes\.txt`$"),
        whole_folder(target) as folder,
    ):
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


@pytest.mark.parametrize("folder", [False, True])
def test_a_target_that_can_be_written_is_tried_and_nothing_is_left(tmp_path: Path, folder: bool) -> None:
    for name in ("new", "deep/er/new", "." + "n" * 250, "ü" * 120):
        check_target(tmp_path / name, folder=folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("-", False, "output `-`: expected the name of a file or folder\nhint: stdout gets tables only, and only without the option"),
        ("-", True, "output `-`: expected the name of a file or folder\nhint: stdout gets tables only, and only without the option"),
        ("-/x.json", False, "output `-`: expected the name of a file or folder\nhint: stdout gets tables only, and only without the option"),
        ("", False, "output `.`: expected the name of a file"),
        ("a/..", False, "output `a/..`: expected the name of a file"),
        ("a\0b", False, "output `a\0b`: no name has a null character in it"),
        ("file", True, "file: is a file, a folder was expected"),
        ("folder", False, "folder: is a folder, a file name was expected"),
        ("pipe", False, "pipe: is a pipe or a device, a file name was expected\nhint: a file of that name would replace it"),
        ("pipe", True, "pipe: is a file, a folder was expected"),
        ("/dev/null", False, "/dev/null: is a pipe or a device, a file name was expected\nhint: a file of that name would replace it"),
        ("stdout", False, "stdout: is a pipe or a device, a file name was expected\nhint: a file of that name would replace it"),
    ],
)  # fmt: skip
def test_a_name_that_no_output_can_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: bool, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("folder").mkdir()
    os.mkfifo("pipe")
    Path("stdout").symlink_to("/proc/self/fd/1")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError) as caught:
        check_target(Path(name), folder=folder)
    assert str(caught.value) == message
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/out.txt", "not a directory"), ("file/deep/out.txt", "not a directory"), ("n" * 256, "file name too long"),
        ("broken/out.txt", "not a directory"), ("a/" * 3000 + "x", "file name too long"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", [False, True])
def test_a_target_that_cannot_be_made_is_told_before_the_work(
    tmp_path: Path, name: str, reason: str, folder: bool
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").symlink_to(tmp_path / "file" / "nowhere")
    with pytest.raises(InputError, match=f"cannot write: ({reason})"):
        check_target(tmp_path / name, folder=folder)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["broken", "file"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that nobody may write")
def test_a_file_system_that_refuses_is_found_before_the_work() -> None:
    for folder in (False, True):
        with pytest.raises(InputError, match=r"^/proc/x/y: cannot write: "):
            check_target(Path("/proc/x/y"), folder=folder)


def test_a_name_of_any_length_that_the_disk_allows_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "ü" * 127):
        write_text(tmp_path / name, "x")
    assert len(list(tmp_path.iterdir())) == 2


def test_two_outputs_of_which_one_would_be_a_folder_for_the_other_are_refused(tmp_path: Path) -> None:
    for pair in (("out", "out/x.csv"), ("out/deep/x.csv", "out")):
        targets = [(tmp_path / name, ()) for name in pair]
        with pytest.raises(UsageError, match="another output would be a file and a folder at once"):
            check_targets(targets, {})
    check_targets([(tmp_path / name, ()) for name in ("out/a", "out/ab", "out.csv")], {})


def test_a_disk_without_room_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    check_space({tmp_path / "a": 400, tmp_path / "new" / "b": 600})
    with pytest.raises(InputError) as caught:
        check_space({tmp_path / "a": 400, tmp_path / "new" / "b": 601})
    assert str(caught.value) == (
        f"{tmp_path / 'new' / 'b'}: 1,001 bytes are to be written, and the disk has room for 1,000\n"
        "hint: free some space, or write to another disk"
    )


def test_only_files_that_are_neither_written_nor_read_nor_hidden_are_others(tmp_path: Path) -> None:
    for name in ("own", "read", ".hidden"):
        (tmp_path / name).write_text("x")
    warn_of_others(tmp_path, {"own"}, [tmp_path / "read"])
    warn_of_others(tmp_path / "new", {"own"})
    for name in ("a", "b", "c", "d", "e"):
        (tmp_path / name).mkdir()
    with pytest.warns(MergecliWarning) as caught:
        warn_of_others(tmp_path, {"own"}, [tmp_path / "read"])
    (text,) = (str(each.message) for each in caught)
    assert text == f"{tmp_path}: has other files, which stay: `a`, `b`, `c` (and 2 more)"


def test_a_folder_that_is_there_may_be_a_disk_of_its_own(tmp_path: Path) -> None:
    disk = Path("/dev/shm")
    if not disk.is_dir() or disk.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two disks")
    with tempfile.TemporaryDirectory(dir=disk) as other:
        (tmp_path / "out").symlink_to(other)
        with whole_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("new")
        assert [each.name for each in Path(other).iterdir()] == ["x"]


def test_a_text_with_a_file_name_that_is_no_unicode_is_written_with_its_escape(tmp_path: Path) -> None:
    write_text(tmp_path / "x.json", '"a\udcff"')
    assert (tmp_path / "x.json").read_bytes() == b'"a\\udcff"'


def test_a_file_that_only_another_user_may_replace_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("theirs")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    check_target(tmp_path / "x")
    tmp_path.chmod(0o1777)
    with pytest.raises(
        InputError, match="x: cannot write: the file is another user's\nhint: write elsewhere with `-o`"
    ):
        check_target(tmp_path / "x")
    check_target(tmp_path / "y")


def test_a_folder_that_another_program_makes_meanwhile_gets_the_files(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "model") as first:
        (first / "config.json").write_text("first")
        with whole_folder(tmp_path / "model") as second:
            (second / "config.json").write_text("second")
    assert (tmp_path / "model" / "config.json").read_text() == "first"
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_a_tilde_that_no_shell_has_replaced_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/you")
    with pytest.raises(UsageError) as refused:
        check_target(Path("~/out/a.safetensors"))
    assert str(refused.value) == (
        "output `~/out/a.safetensors`: `~` would be the name of a folder here\nhint: write `/home/you/out/a.safetensors`"
    )
    check_target(Path("a~/~nosuchuser.safetensors"))
