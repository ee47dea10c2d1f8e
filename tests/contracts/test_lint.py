"""The rules that a machine can check, checked by the tools that `make setup` installs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=["rules", "format"])
def test_ruff_finds_nothing(arguments: list[str]) -> None:
    ruff = Path(sys.executable).parent / "ruff"
    done = subprocess.run([str(ruff), *arguments, "--quiet", "."], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
