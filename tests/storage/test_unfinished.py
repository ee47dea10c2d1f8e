"""What killed programs left is removed by the next one; what a living program writes stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mergecli.storage.atomic import check_target, whole_file, whole_folder
from mergecli.storage.unfinished import is_leftover, new_name, remove_leftovers

WRITE = """
import sys, time
from pathlib import Path
from mergecli.storage.atomic import whole_file, whole_folder
with whole_file(Path("m.safetensors")) as file, whole_folder(Path("model")) as folder:
    file.write(b"half")
    (folder / "config.json").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def writer(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is writing a file and a folder."""
    process = subprocess.Popen([sys.executable, "-c", WRITE], cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(re.sub(r"[0-9]+-[0-9a-f]{8}", "N", each.name) for each in folder.iterdir())


PARTS = [".m.safetensors.N.part", ".model.N.part"]


def test_what_a_killed_program_left_is_removed_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    with writer(tmp_path) as first, writer(tmp_path):
        assert names(tmp_path) == sorted(2 * PARTS)
        remove_leftovers(tmp_path)
        assert names(tmp_path) == sorted(2 * PARTS)
        first.kill()
        first.wait()
        check_target(tmp_path / "other.safetensors")
        assert names(tmp_path) == PARTS
    check_target(tmp_path / "new-model", folder=True)
    assert names(tmp_path) == []


def test_a_program_does_not_take_its_own_files_for_left(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a") as file, whole_folder(tmp_path / "b") as folder:
        for each in tmp_path.iterdir():
            os.utime(each, (0, 0))
            assert not is_leftover(each)
        remove_leftovers(tmp_path)
        file.write(b"x")
        (folder / "c").write_text("y")
    assert names(tmp_path) == ["a", "b"]


def test_a_file_without_a_lock_is_left_once_its_program_has_ended_or_had_time_to_lock_it(
    tmp_path: Path,
) -> None:
    own = new_name(tmp_path / "x")
    own.write_text("half")
    assert not is_leftover(own)
    os.utime(own, (time.time() - 100,) * 2)
    assert is_leftover(own)  # the number was another program's, of another container
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    other = tmp_path / f".x.{ended.stdout.strip()}-00112233.part"
    other.write_text("half")
    assert is_leftover(other)


def test_on_a_disk_without_locks_only_the_old_files_of_ended_programs_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with whole_file(tmp_path / "y") as file:
        file.write(b"x")
    path = tmp_path / ".x.999999999-00112233.part"
    path.write_text("half")
    assert not is_leftover(path)
    os.utime(path, (0, 0))
    assert is_leftover(path)


@pytest.mark.parametrize(
    "name",
    [
        "x.part",
        ".x.part",
        ".x.12345678.part",
        "x.1-00112233.part",
        ".x.1-0011223.part",
        ".x.1-00112233.partial",
    ],
)
def test_files_of_other_programs_are_never_removed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("x")
    os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert path.exists()


def test_a_link_that_looks_like_a_left_file_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    link = tmp_path / ".x.999999999-00112233.part"
    link.symlink_to(tmp_path / "mine")
    remove_leftovers(tmp_path)
    assert (tmp_path / "mine").exists()
    assert link.is_symlink()
