"""A user's day, typed into a shell: steps that compose through files, pipes and make. The README's day runs daily."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import without_end
from tests.support.tiny_clip import make_image_task, make_tiny_clip

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def shell(script: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_only_notes(without_end(done.stderr))
    return done.stdout


def assert_only_notes(talk: str) -> None:
    """That nothing was said but which images were counted."""
    assert [line for line in talk.splitlines() if not line.startswith("note: ")] == []
    assert ": used " in talk


def test_the_day_of_the_readme_on_toys(tmp_path: Path) -> None:
    out = shell(
        f"""
        R={ROOT}/recipes/toy.toml
        mergecli fetch $R | xargs ls -d > fetched.txt
        mergecli cos-sim $(mergecli taskvector $R -o tv/) -o out/cos.csv --plot out/cos.png | head -2 | cut -f 1-3
        mergecli merge $R --method ties --set method.density=0.2 -o out/ties.safetensors
        mergecli eval out/ties.safetensors --recipe $R --task digits,colours -o out/ties.json > /dev/null
        mergecli eval toy:base --recipe $R --task digits,colours -o out/base.json --min-average 0.4 > /dev/null
        mergecli report out/*.json | cut -f 1,2
        """,
        tmp_path,
    )
    assert out.splitlines()[0] == "\tdigits\tletters"
    assert out.splitlines()[2:] == ["out/ties.safetensors", "model\tmethod", "base\tpretrained", "ties\tties"]
    assert len((tmp_path / "fetched.txt").read_text().splitlines()) == 9
    assert (tmp_path / "out/cos.png").stat().st_size > 1000


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A base and two models with other vision towers, as plain files and folders, with the images of two tasks."""
    whole = load_file(make_tiny_clip(tmp_path / "base") / "model.safetensors")
    tables = ""
    for seed, name in enumerate(("warm", "cold"), 1):
        model = make_tiny_clip(tmp_path / name, seed) / "model.safetensors"
        tower = {key: each for key, each in load_file(model).items() if key.startswith("vision_model.")}
        save_file(whole | tower, model)
        make_image_task(tmp_path / "data" / name, seed=seed)
        tables += f'[tasks.{name}]\ndata = "data/{name}"\ntemplates = ["a {{}} thing"]\n'
    (tmp_path / "r.toml").write_text(f'base = "base"\n[tuned]\nwarm = "warm"\ncold = "cold"\n{tables}')
    return tmp_path


def test_the_same_day_with_files_alone(files: Path) -> None:
    out = shell(
        """
        for t in warm cold; do mergecli taskvector $t --base base -o tv/$t.safetensors; done
        mergecli merge --base base --method task_arithmetic tv/*.safetensors -o m.safetensors
        mergecli eval m.safetensors --recipe r.toml -o m.json | tail -1 | cut -f 1
        mergecli info m.safetensors --recipe | grep -c scaling_factor
        """,
        files,
    )
    assert out.splitlines() == ["tv/warm.safetensors", "tv/cold.safetensors", "m.safetensors", "m", "1"]


def test_make_runs_an_experiment_once_and_nothing_the_second_time(files: Path) -> None:
    make = [
        "make",
        "-j2",
        "-C",
        str(ROOT / "recipes"),
        f"RECIPE={files}/r.toml",
        f"OUT={files}/out",
        "MERGES=average ties-0.5",
    ]
    first, second = (
        subprocess.run(make, capture_output=True, text=True, env=environment() | {"MAKEFLAGS": ""})
        for _ in range(2)
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert_only_notes(without_end(first.stderr))
    report = (files / "out/report.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in report[2:]] == [
        "| base",
        "| average",
        "| ties-0.5",
        "|  ",
        "| fine-tuned",
    ], "the fine-tuned models stand apart"
    assert second.returncode == 0
    assert "Nothing to be done" in second.stdout
    assert "mergecli" not in second.stdout
