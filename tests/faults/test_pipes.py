"""Quiet in a pipe, whole on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

from tests.conftest import Run, World, without_end

PROGRAM = f"{sys.executable} -m mergecli"


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path) -> None:
    for command in ("tasks", "methods", "tasks sun397", "--help"):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {PROGRAM} {command} | head -1"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert (done.returncode, without_end(done.stderr)) == (0, ""), command
        assert len(done.stdout.splitlines()) == 1


def test_a_reader_that_never_reads_ends_it_quietly(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {PROGRAM} tasks --json | true"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_in_a_pipe_there_is_data_on_stdout_and_nothing_on_stderr(world: World, run: Run) -> None:
    ended = run("merge", "t1.safetensors", "t2.safetensors", "--method", "average", "-o", "m.safetensors")
    assert (ended.status, ended.out, ended.err) == (0, "m.safetensors\n", "")
    ended = run("cos-sim", "--base", "base.safetensors", "t1.safetensors", "t2.safetensors")
    assert (ended.status, ended.err) == (0, "")
    rows = [line.split("\t") for line in ended.out.splitlines()]
    assert rows[0] == ["", "t1", "t2"]
    assert [row[0] for row in rows[1:]] == ["t1", "t2"]


def on_a_terminal(command: list[str], folder: Path, **environment: str) -> str:
    """What the program writes when stdout and stderr are a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mergecli", *command], cwd=folder, stdout=slave, stderr=slave, stdin=slave,
        env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "TERM": "xterm", **environment},
    )  # fmt: skip
    os.close(slave)
    chunks: list[bytes] = []
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        chunks.append(chunk)
    process.wait(60)
    os.close(master)
    return b"".join(chunks).decode()


def test_on_a_terminal_there_is_a_drawn_table(tmp_path: Path) -> None:
    out = on_a_terminal(["tasks", "ta8"], tmp_path)
    assert "─" in out
    assert "\t" not in out


def test_a_narrow_terminal_cuts_no_number(tmp_path: Path) -> None:
    out = on_a_terminal(["tasks", "ta8"], tmp_path, COLUMNS="20", TERM="dumb", NO_COLOR="1")
    lines = out.partition("note:")[0].splitlines()
    assert max(map(len, lines)) <= 20
    counts = [line.split()[1] for line in lines if line.startswith("   classes:")]
    assert counts == ["397", "196", "45", "10", "10", "43", "10", "47"]


def test_errors_are_colored_on_a_terminal_only_and_not_with_no_color(tmp_path: Path) -> None:
    assert "\x1b[1;31merror:" in on_a_terminal(["methods", "tise"], tmp_path)
    assert "\x1b[" not in on_a_terminal(["methods", "tise"], tmp_path, NO_COLOR="1")
    assert "\x1b[" not in on_a_terminal(["tasks", "ta8"], tmp_path, NO_COLOR="1", TERM="dumb")
