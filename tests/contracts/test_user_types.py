"""A user's script passes the strictest type checker: the package tells its types, down to what functions give back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pyright") is None, reason="pyright is not installed")
@pytest.mark.parametrize("page", ["README.md", "docs/guide/python.md"])
def test_the_examples_of_a_page_are_clean_for_pyright(page: str, tmp_path: Path) -> None:
    blocks = PYTHON.findall((ROOT / page).read_text("utf-8"))
    assert blocks
    imports = sorted(
        {line for block in blocks for line in re.findall(r"^(?:import|from) .*", block, re.MULTILINE)}
    )
    bodies = [re.sub(r"^(?:import|from) .*\n", "", block, flags=re.MULTILINE) for block in blocks]
    (tmp_path / "script.py").write_text("\n".join([*imports, *bodies]))
    config = {
        "typeCheckingMode": "strict", "include": ["script.py"], "extraPaths": [str(ROOT)],
        "reportUnknownMemberType": False,  # pandas is only partly typed
    }  # fmt: skip
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert [f"{each['range']['start']['line'] + 1}: {each['message']}" for each in found] == []
