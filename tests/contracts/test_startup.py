"""What a command may import before it does its work, checked in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergecli.cli import app

HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "rich",
    "numpy",
    "pydantic",
    "PIL",
    "pyarrow",
    "matplotlib",
    "click",
}
COMMANDS = sorted(str(command.name) for command in app.registered_commands)


def imported(*arguments: str, folder: Path) -> tuple[int, set[str]]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mergecli", *arguments],
        capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert lines, done.stderr
    return done.returncode, {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize("command", [[], *[[each] for each in COMMANDS]])
def test_help_imports_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    status, modules = imported(*command, "--help", folder=tmp_path)
    assert status == 0
    assert modules & HEAVY == set()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mrege"], 2),
        (["merge", "--no-such-option"], 2),
        (["merge", "a.safetensors", "--method", "tise", "-o", "x.safetensors"], 2),
        (["merge", "wrong.toml", "-o", "x.safetensors"], 2),
        (["merge", "missing.toml", "-o", "x.safetensors"], 3),
        (["merge", "missing.safetensors", "--method", "average", "-o", "x.safetensors"], 3),
        (["merge", "a.safetensors", "--method", "average", "-o", "x.bin"], 2),
        (["taskvector", "a.safetensors", "-o", "x.safetensors"], 2),
        (["eval", "a.safetensors", "-o", "x.json"], 2),
        (["eval", "a.safetensors", "--clip", "b", "--tasks", "mnits"], 2),
        (["eval", "a.safetensors", "--min-average", "70"], 2),
        (["cos-sim", "missing.safetensors"], 3),
        (["report", "missing.json"], 3),
        (["report", "x.json", "--format", "xls"], 2),
        (["finetune", "--task", "digits", "-o", "x"], 2),
        (["info", "missing.safetensors"], 3),
        (["methods", "tise"], 2),
        (["tasks", "mnits"], 2),
        (["fetch", "toy:bas"], 3),
    ],
)
def test_a_wrong_command_is_answered_without_importing_anything_heavy(
    arguments: list[str], expected: int, tmp_path: Path
) -> None:
    (tmp_path / "wrong.toml").write_text('[method]\nname = "ties"\ndensity = 2\n')
    status, modules = imported(*arguments, folder=tmp_path)
    assert status == expected
    assert modules & HEAVY == set()


@pytest.mark.parametrize(
    "command", [["methods"], ["methods", "ties"], ["tasks"], ["tasks", "mnist"], ["--version"]]
)
def test_lists_import_no_torch(command: list[str], tmp_path: Path) -> None:
    status, modules = imported(*command, folder=tmp_path)
    assert status == 0
    assert modules & (HEAVY - {"rich"}) == set()


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = "import mergecli, sys; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {module.split(".")[0] for module in out.split()} & HEAVY == set()
