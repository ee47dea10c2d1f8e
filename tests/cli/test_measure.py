"""`mergecli measure`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run
from tests.support.image_zoo import make_zoo

pytestmark = pytest.mark.usefixtures("own_store")

FEW = ("--set", "method.examples=8", "--set", "method.batch_size=4")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    make_zoo(tmp_path)
    return tmp_path / "zoo.toml"


def test_tasks_measured_one_by_one_give_the_files_of_all_at_once(recipe: Path, run: Run) -> None:
    command = ("measure", "zoo.toml", "--method", "reg_mean", *FEW, "-o")
    outs = [run(*command, "two", "--task", tasks).out for tasks in ("a,c", "b")]
    assert outs == ["two/a.safetensors\ntwo/c.safetensors\n", "two/b.safetensors\n"]
    ended = run(*command, "one")
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


def test_only_takes_names_and_no_empty_ones(recipe: Path, run: Run) -> None:
    command = ("measure", "zoo.toml", "--method", "reg_mean", *FEW, "-o", "s", "--task")
    ended = run(*command, "b,,")
    assert (ended.status, ended.out) == (0, "s/b.safetensors\n"), ended.err
    ended = run(*command, " ,")
    assert (ended.status, ended.out) == (2, "")
    assert "--task: is empty" in ended.err
