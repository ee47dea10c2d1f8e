"""Targets that cannot be written, disks that are full, and work that is interrupted: nothing partial is left."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Run, World

MERGE = ["merge", "--base", "base.safetensors", "t1.safetensors", "t2.safetensors", "--method", "ties"]


def test_a_full_disk_is_told_before_the_work_and_the_old_file_stays(world: World) -> None:
    target = world.folder / "m.safetensors"
    target.write_text("old")
    before = sorted(world.folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "mergecli", *MERGE, "-o", "m.safetensors"], cwd=world.folder, capture_output=True,
        text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines() == [
        "error: m.safetensors: cannot write: file too large",
        "hint: the limit on file sizes (`ulimit -f`, or the file system's own) is below what is needed",
    ]
    assert target.read_text() == "old"
    assert sorted(world.folder.iterdir()) == before


def test_a_target_below_a_file_is_refused(world: World, run: Run) -> None:
    ended = run(*MERGE, "-o", "t1.safetensors/m.safetensors")
    assert ended.status == 3
    assert "error: t1.safetensors/m.safetensors: cannot write: " in ended.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_told_with_a_hint(world: World, run: Run) -> None:
    locked = world.folder / "locked"
    locked.mkdir(mode=0o500)
    ended = run(*MERGE, "-o", "locked/m.safetensors")
    assert ended.status == 3
    assert ended.err.startswith(
        "error: locked/m.safetensors: cannot write: permission denied\nhint: check the folder"
    )


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a file system that nobody may write")
def test_a_file_system_that_refuses_writing_is_told(world: World, run: Run) -> None:
    ended = run(*MERGE, "-o", "/proc/m.safetensors")
    assert (ended.status, ended.out) == (3, "")
    assert ended.err.startswith("error: /proc/m.safetensors: cannot write: ")


def test_a_folder_as_file_and_an_input_as_output_are_refused(world: World, run: Run) -> None:
    (world.folder / "d.safetensors").mkdir()
    ended = run(*MERGE, "-o", "d.safetensors")
    assert (ended.status, ended.err.splitlines()[0]) == (
        2,
        "error: d.safetensors: is a folder, a file name was expected",
    )
    content = world.files["t1"].read_bytes()
    ended = run(*MERGE, "-o", "./t1.safetensors")
    assert (ended.status, ended.err.splitlines()[0]) == (
        2, "error: t1.safetensors: the output would replace an input (t1)",
    )  # fmt: skip
    assert world.files["t1"].read_bytes() == content


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_merge_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, number: int, status: int
) -> None:
    """Interrupted while the new file is being written: as soon as it is seen beside its target."""
    weights = {f"w{i}": torch.randn(1 << 20) for i in range(24)}
    save_file(weights, tmp_path / "base.safetensors")
    for name in ("t1", "t2"):
        save_file({k: v + 0.1 for k, v in weights.items()}, tmp_path / f"{name}.safetensors")
    target = tmp_path / "m.safetensors"
    target.write_text("old")
    before = sorted(tmp_path.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-m", "mergecli", *MERGE, "-o", target.name], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".m.safetensors.*.part")):
        assert process.poll() is None, "the merge ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (status, "")
    assert "Traceback" not in err
    assert target.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == before


def test_two_merges_to_one_target_leave_one_whole_file(world: World, run: Run) -> None:
    command = [sys.executable, "-m", "mergecli", *MERGE, "-o", "m.safetensors"]
    processes = [subprocess.Popen(command, cwd=world.folder, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    for process in processes:
        process.communicate()
    assert run("info", "m.safetensors").status == 0
    assert not list(world.folder.glob(".*"))
