"""Targets that cannot be written, disks that are full, and work that is interrupted: nothing partial is left."""

from __future__ import annotations

import os
import resource
import shutil
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


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of 96 MB and their base: a merge takes long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("large")
    weights = {f"w{i}": torch.randn(1 << 20) for i in range(24)}
    save_file(weights, folder / "base.safetensors")
    for name in ("t1", "t2"):
        save_file({k: v + 0.1 for k, v in weights.items()}, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupted_merge_leaves_the_old_file_and_nothing_else(
    large: Path, number: int, status: int
) -> None:
    """Interrupted while the new file is being written: as soon as it is seen beside its target."""
    target = large / "m.safetensors"
    target.write_text("old")
    before = sorted(large.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-m", "mergecli", *MERGE, "-o", target.name], cwd=large, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(large.glob(".m.safetensors.*.part")):
        assert process.poll() is None, "the merge ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    kept = "interrupted: nothing new is kept; the same command starts again\n"
    assert (process.returncode, out, err) == (status, "", kept)
    assert target.read_text() == "old"
    assert sorted(large.iterdir()) == before


def test_two_merges_to_one_target_leave_one_whole_file(world: World, run: Run) -> None:
    command = [sys.executable, "-m", "mergecli", *MERGE, "-o", "m.safetensors"]
    processes = [subprocess.Popen(command, cwd=world.folder, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    for process in processes:
        process.communicate()
    assert run("info", "m.safetensors").status == 0
    assert not list(world.folder.glob(".*"))


@pytest.mark.parametrize(
    "command",
    [
        [*MERGE, "-o", "-"],
        [*MERGE, "--sweep", "method.density=0.1,0.2", "-o", "-"],
        [*MERGE, "-o", "m.safetensors", "--plot", "-"],
        ["taskvector", "t1.safetensors", "--base", "base.safetensors", "-o", "-"],
        ["cos-sim", "--base", "base.safetensors", "t1.safetensors", "t2.safetensors", "-o", "-"],
        ["extract", "t1.safetensors", "--base", "base.safetensors", "--rank", "1", "-o", "-"],
        ["eval", "toy:base", "--clip", "toy:base", "--task", "digits", "--limit", "1", "-o", "-"],
        ["finetune", "--base", "toy:base", "--task", "digits", "--steps", "1", "-o", "-"],
        ["report", "r.json", "-o", "-"],
    ],
    ids=lambda command: " ".join([command[0], *command[-2:]]),
)
def test_stdout_is_no_file_for_any_command(world: World, run: Run, command: list[str]) -> None:
    before = sorted(world.folder.iterdir())
    ended = run(*command)
    assert (ended.status, ended.out) == (2, "")
    assert "-" in ended.err.splitlines()[0]
    assert sorted(world.folder.iterdir()) == before


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="there is no null device")
def test_no_device_is_replaced_by_a_file(world: World, run: Run) -> None:
    ended = run(*MERGE, "-o", "/dev/null")
    assert (ended.status, ended.out) == (2, "")
    ended = run(
        "cos-sim", "--base", "base.safetensors", "t1.safetensors", "t2.safetensors", "-o", "/dev/null"
    )
    assert ended.status == 2
    assert Path("/dev/null").is_char_device()


def test_a_disk_without_room_is_told_before_anything_is_computed(
    world: World, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(world.folder)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr("mergecli.merging.merge.learning", None)
    monkeypatch.setattr("mergecli.merging.taskvector._subtract", None)
    size = sum(each.numel() * each.element_size() for each in world.base.values())
    (world.folder / "r.toml").write_text(
        'base = "base.safetensors"\n[tuned]\na = "t1.safetensors"\nb = "t2.safetensors"\nc = "t3.safetensors"\n'
    )
    points = "method.density=0.1,0.2,0.3"
    for command, needed in (
        (["merge", "r.toml", "--method", "ties", "--sweep", points, "-o", "swept"], 3 * size),
        (["taskvector", "r.toml", "-o", "vectors"], 3 * (size - 32)),
    ):
        ended = run(*command)
        assert ended.status == 3
        assert f": {needed:,} bytes are to be written, and the disk has room for 50,000\n" in ended.err
    assert not (world.folder / "swept").exists()


def test_a_folder_with_other_files_is_told(world: World, run: Run) -> None:
    (world.folder / "config.json").write_text("{}")
    (world.folder / "r.toml").write_text(
        'base = "base.safetensors"\n[tuned]\na = "t1.safetensors"\nb = "t2.safetensors"\n'
    )
    (world.folder / "out").mkdir()
    (world.folder / "out" / "old.safetensors").write_text("x")
    told = "warning: out: has other files, which stay: `old.safetensors`\n"
    for command in (
        ["taskvector", "r.toml", "-o", "out"],
        ["taskvector", "r.toml", "-o", "out"],
    ):
        ended = run(*command)
        assert (ended.status, ended.err) == (0, told)
    ended = run("merge", "r.toml", "--method", "ties", "--sweep", "method.density=0.1,0.2", "-o", "out")
    assert (
        ended.err
        == "warning: out: has other files, which stay: `a.safetensors`, `b.safetensors`, `old.safetensors`\n"
    )
    ended = run("merge", "r.toml", "--method", "ties", "--sweep", "method.density=0.1,0.2", "-o", "new")
    assert (ended.status, ended.err) == (0, "")
    ended = run("merge", "r.toml", "--method", "ties", "--sweep", "method.density=0.1,0.2", "-o", "new")
    assert (ended.status, ended.err) == (0, "")


def test_what_a_killed_merge_left_is_removed_by_the_next_one(world: World, run: Run) -> None:
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    script = f"import sys\nimport mergecli.merging.merge as m\nfrom mergecli.cli import run\ndef cast(*_):\n    {kill}\nm.cast = cast\nrun(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, *MERGE, "-o", "m.safetensors"], cwd=world.folder, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL
    assert len(list(world.folder.glob(".m.safetensors.*.part"))) == 1
    assert run(*MERGE, "-o", "other.safetensors").status == 0
    assert not list(world.folder.glob(".*"))


def test_a_terminal_that_goes_does_not_end_what_nohup_runs(world: World) -> None:
    command = [sys.executable, "-m", "mergecli", *MERGE, "-o", "m.safetensors"]
    process = subprocess.Popen(
        command, cwd=world.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    for _ in range(20):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.05)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"m.safetensors\n")
