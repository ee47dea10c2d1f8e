"""What is installed: the wheel has the whole package, data too, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = [
    "mergecli/py.typed",
    "mergecli/data/prompts/mnist.toml",
    "mergecli/data/task_sets.toml",
    "mergecli/data/toy/models/base/model.safetensors",
    "mergecli/data/toy/models/base/tokenizer.json",
    "mergecli/results/page.html",
    "mergecli/results/references/clip-vit-ta8.csv",
]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (file,) = tmp_path.glob("mergecli-*.whl")
    with zipfile.ZipFile(file) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert set(DATA) <= inside
    package = (each for each in (ROOT / "mergecli").rglob("*") if each.is_file())
    assert inside == {
        each.relative_to(ROOT).as_posix() for each in package if "__pycache__" not in each.parts
    }
