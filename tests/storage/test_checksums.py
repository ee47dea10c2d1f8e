"""Checksums: what they notice, when, and what the file is like that has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.checksums import CHUNK_ENTRIES, KEY, DamagedFileError, checksums_of
from mergecli.storage.safetensors_writer import SafetensorsWriter, save_tensors
from tests.support.kept_files import flip

TENSORS = {
    "long": torch.arange(CHUNK_ENTRIES + 5, dtype=torch.float32),
    "none": torch.zeros(0, 3),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "short": torch.arange(9, dtype=torch.uint8),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_tensors(TENSORS, tmp_path / "x.safetensors", {"kind": "thing"}, checked=True)
    return tmp_path / "x.safetensors"


def test_a_checked_file_is_a_safetensors_file_like_any_other(file: Path) -> None:
    assert {name: each.tolist() for name, each in load_file(file).items()} == {
        name: each.tolist() for name, each in TENSORS.items()
    }
    with safe_open(file, "pt") as opened:
        assert set(opened.metadata()) == {"kind", KEY}


def test_its_checksums_are_not_part_of_what_it_says_of_itself_nor_of_its_digest(
    file: Path, tmp_path: Path
) -> None:
    save_tensors(TENSORS, tmp_path / "plain.safetensors", {"kind": "thing"})
    with open_checkpoint(file) as checked, open_checkpoint(tmp_path / "plain.safetensors") as plain:
        assert checked.metadata == plain.metadata == {"kind": "thing"}
        assert checked.digest() == plain.digest()


@pytest.mark.parametrize("block", [5000, 1 << 16, CHUNK_ENTRIES])
def test_the_bytes_do_not_depend_on_the_order_and_the_blocks_of_writing(
    file: Path, tmp_path: Path, block: int
) -> None:
    other, long = tmp_path / "other.safetensors", TENSORS["long"]
    layout = {
        "long": ("F32", (len(long),)),
        "none": ("F32", (0, 3)),
        "scalar": ("I64", ()),
        "short": ("U8", (9,)),
    }
    starts = list(range(0, len(long), block))
    if block > 5000:
        starts.reverse()
    with SafetensorsWriter(other, layout, {"kind": "thing"}, checked=True) as writer:
        for start in starts:
            writer.write("long", long[start : start + block], start)
        for name in ("short", "none", "scalar"):
            writer.write(name, TENSORS[name])
    assert other.read_bytes() == file.read_bytes()


def data_starts(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_a_changed_bit_is_noticed_when_its_chunk_is_read_and_the_others_are_read_as_they_are(
    file: Path,
) -> None:
    with open_checkpoint(file) as opened:
        start = opened.entries["long"].start
    flip(file, 8 * (start + 4 * CHUNK_ENTRIES))
    with open_checkpoint(file, checked=True, cure="make it again") as opened:
        assert opened.read("short").tolist() == list(range(9))
        assert opened.read_entries("long", 0, CHUNK_ENTRIES).equal(TENSORS["long"][:CHUNK_ENTRIES])
        for read in (
            lambda: opened.read("long"),
            lambda: opened.digest(),
            lambda: opened.read_entries("long", CHUNK_ENTRIES, CHUNK_ENTRIES + 5),
        ):
            with pytest.raises(DamagedFileError) as caught:
                read()
            assert str(caught.value) == (
                f"{file}: is damaged: `long` is not what was written\nhint: make it again"
            )


def test_a_part_of_a_chunk_is_noticed_when_the_rest_of_it_has_been_read(file: Path) -> None:
    with open_checkpoint(file) as opened:
        flip(file, 8 * opened.entries["short"].start)
    with open_checkpoint(file) as opened:
        assert opened.read_entries("short", 0, 4).tolist() == [1, 1, 2, 3]
        with pytest.raises(DamagedFileError):
            opened.read_entries("short", 4, 9)


def test_every_bit_of_the_header_is_covered(file: Path) -> None:
    whole = file.read_bytes()
    for bit in range(8 * data_starts(file)):
        flip(file, bit)
        try:
            with open_checkpoint(file, checked=True) as opened:
                # the same digits in capital letters are the same checksums
                assert file.read_bytes().lower() == whole.lower()
                assert opened.metadata == {"kind": "thing"}
        except DamagedFileError:
            pass
        with file.open("r+b") as again:
            again.seek(bit // 8)
            again.write(whole[bit // 8 : bit // 8 + 1])


def test_a_file_of_ours_that_lacks_its_checksums_is_damaged_and_one_of_others_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, file)
    with open_checkpoint(file) as opened:
        assert opened.read("a").tolist() == [1, 1, 1]
        with pytest.raises(DamagedFileError) as caught:
            opened.expect_checksums("make it again")
    with pytest.raises(DamagedFileError) as other:
        open_checkpoint(file, checked=True, cure="make it again")
    assert str(caught.value) == str(other.value)
    assert str(caught.value) == (
        f"{file}: has no checksums: it is damaged, or was written by another program\nhint: make it again"
    )


def test_the_checksums_of_another_programs_file_are_those_that_ours_would_have(
    file: Path, tmp_path: Path
) -> None:
    with safe_open(file, "pt") as opened:
        own = opened.metadata()[KEY]
    assert checksums_of(file) == own
    (tmp_path / "no.safetensors").write_text("nothing")
    assert checksums_of(tmp_path / "no.safetensors") is None


def changed_in_place(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\1")
    os.utime(file, ns=(1, 1))


def replaced(file: Path) -> None:
    save_file({"a": torch.zeros(1000)}, file.with_name("new"))
    file.with_name("new").replace(file)


def grown(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"more")


@pytest.mark.parametrize("change", [changed_in_place, replaced, grown])
def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path: Path, change) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1000), "b": torch.ones(3)}, file)
    with open_checkpoint(file) as opened:
        opened.read("a")
        change(file)
        for read in (lambda: opened.read("b"), opened.digest):
            with pytest.raises(InputError) as caught:
                read()
            assert str(caught.value) == (
                f"{file}: changed while it was being read\n"
                "hint: wait until whatever writes it has finished, then start again"
            )


def test_an_input_that_is_deleted_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, file)
    with open_checkpoint(file) as opened:
        file.unlink()
        assert opened.read("a").tolist() == [1, 1, 1]
