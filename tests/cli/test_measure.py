"""`mergecli measure` as real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.looking import make_zoo

FEW = ("--set", "method.examples=8", "--set", "method.batch_size=4")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_zoo(tmp_path)
    return tmp_path / "zoo.toml"


def test_tasks_measured_by_two_processes_at_once_give_the_files_of_one(recipe: Path, run: Run) -> None:
    command = [sys.executable, "-m", "mergecli", "measure", recipe, "--method", "reg_mean", *FEW, "-o", "two"]
    several = [
        subprocess.Popen([*command, "--only", tasks], cwd=recipe.parent, stdout=subprocess.PIPE, text=True)
        for tasks in ("a,c", "b")
    ]
    outs = [process.communicate()[0] for process in several]
    assert outs == ["two/a.safetensors\ntwo/c.safetensors\n", "two/b.safetensors\n"]
    ended = run("measure", "zoo.toml", "--method", "reg_mean", *FEW, "-o", "one")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out == "one/a.safetensors\none/b.safetensors\none/c.safetensors\n"
    for name in "abc":
        one, two = (recipe.parent / folder / f"{name}.safetensors" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    ended = run(
        "merge", "zoo.toml", "--method", "reg_mean", *FEW, "--statistics", "two", "-o", "m.safetensors"
    )
    assert (ended.status, ended.out, ended.err) == (0, "m.safetensors\n", "")
    assert not (recipe.parent / "home" / "statistics").exists()


def test_a_method_that_measures_nothing_is_a_usage_error(recipe: Path, run: Run) -> None:
    ended = run("measure", "zoo.toml", "--method", "ties", "-o", "s")
    assert (ended.status, ended.out) == (2, "")
    assert "error: `ties` measures nothing" in ended.err
    ended = run("merge", "zoo.toml", "--method", "ties", "--statistics", "s", "-o", "m.safetensors")
    assert (ended.status, ended.out) == (2, "")
    assert "`ties` measures nothing" in ended.err
