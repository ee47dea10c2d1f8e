"""The notebook runs from its first cell to its last, and prints what it shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
PROGRAM = "import json, sys, notebook; print(json.dumps(notebook.ran(json.load(open(sys.argv[1])))))"


def shown(text: str) -> list[str]:
    """What the cells of a notebook print; fractions may differ from processor to processor."""
    outputs = [each for cell in json.loads(text)["cells"] for each in cell.get("outputs", [])]
    return [re.sub(r"\d+\.\d+", "#", "".join(each["text"])) for each in outputs]


@pytest.mark.slow
def test_the_notebook_prints_what_it_shows() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(NOTEBOOK)],
        cwd=ROOT / "scripts", capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shown(done.stdout) == shown(NOTEBOOK.read_text("utf-8"))


def test_the_notebook_names_no_place_on_this_machine() -> None:
    text = NOTEBOOK.read_text("utf-8")
    assert not re.search(r"/(tmp|home|root|Users|work)/", text)
