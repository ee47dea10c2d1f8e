"""Every shipped recipe parses and names what exists."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mergecli.catalogue import read_recipe
from mergecli.clip.tasks import expand, names

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_recipe_parses_and_its_tasks_are_built_in(file: Path) -> None:
    recipe = read_recipe(file)
    assert recipe.base is not None
    assert set(recipe.tuned) <= set(names())
    assert set(expand(recipe.eval_tasks, recipe)) <= set(names())


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_recipe_begins_with_the_commands_that_use_it(file: Path) -> None:
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any(f"mergecli merge recipes/{file.name}" in line for line in head)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_the_model_of_a_task_is_the_model_of_that_task(file: Path) -> None:
    for task, source in read_recipe(file).tuned.items():
        assert str(source).endswith(task)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_make_shows_the_plan_of_a_recipe(file: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-n", "-C", str(file.parent), f"RECIPE={file.name}", f"OUT={tmp_path}"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("taskvector", "cos-sim", "merge", "eval", "report"):
        assert f"mergecli {part}" in done.stdout
