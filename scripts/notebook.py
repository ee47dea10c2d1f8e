"""Runs the code cells of the notebook in order, in one process, and writes what they print back into it.

    python scripts/notebook.py [--check]

`--check` writes nothing, and ends with status 1 if a cell prints something else than the notebook shows. No Jupyter is needed: the
cells are plain Python.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from contextlib import chdir, redirect_stdout
from difflib import unified_diff
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def ran(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with what its cells print in an empty folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code":
                cells.append(cell)
                continue
            out = io.StringIO()
            with redirect_stdout(out):
                exec(compile("".join(cell["source"]), "<cell>", "exec"), names)
            text = out.getvalue().splitlines(keepends=True)
            outputs = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
            cells.append(
                {
                    **cell,
                    "execution_count": 1 + sum(each["cell_type"] == "code" for each in cells),
                    "outputs": outputs,
                }
            )
    return {**notebook, "cells": cells}


def text_of(notebook: dict[str, Any]) -> str:
    """The file of a notebook."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    before = NOTEBOOK.read_text("utf-8")
    after = text_of(ran(json.loads(before)))
    if "--check" in sys.argv:
        sys.stdout.writelines(
            unified_diff(before.splitlines(True), after.splitlines(True), "shown", "printed")
        )
        return int(before != after)
    NOTEBOOK.write_text(after, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
