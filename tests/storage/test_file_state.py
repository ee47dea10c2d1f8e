from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mergecli.runtime.errors import InputError
from mergecli.storage.file_state import expect_unchanged, is_unchanged, state_of


def written_to(file: Path) -> None:
    file.write_bytes(b"other")
    os.utime(file, ns=(1, 2))


def grown(file: Path) -> None:
    before = file.stat()
    file.write_bytes(b"bytes, and more")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> None:
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize("change", [written_to, grown, replaced])
def test_a_file_that_has_changed_is_refused(tmp_path: Path, change: Callable[[Path], None]) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"bytes")
    before = state_of(file)
    change(file)
    assert not is_unchanged(file, before)
    with pytest.raises(InputError) as caught:
        expect_unchanged(file, before)
    assert str(caught.value) == (
        f"{file}: changed while it was being read\n"
        "hint: wait until whatever writes it has finished, then start again"
    )


def test_reading_a_file_and_linking_it_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"bytes")
    before = state_of(file)
    file.read_bytes()
    os.utime(file, ns=(5, file.stat().st_mtime_ns))
    (tmp_path / "link").hardlink_to(file)
    expect_unchanged(file, before)


def test_what_was_deleted_is_whole_for_who_has_it_open_but_not_if_it_was_written_to_before(
    tmp_path: Path,
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"bytes")
    before = state_of(file)
    with file.open("rb") as opened:
        file.unlink()
        expect_unchanged(file, before, opened.fileno())
    file.write_bytes(b"bytes")
    before = state_of(file)
    with file.open("r+b") as opened:
        opened.truncate(2)
        file.unlink()
        with pytest.raises(InputError, match="changed while it was being read"):
            expect_unchanged(file, before, opened.fileno())
