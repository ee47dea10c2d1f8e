"""Every shipped recipe parses and names what exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mergecli.data.tasks import expand, names
from mergecli.recipe.reading import recipe_of
from mergecli.results import references
from tests.conftest import without_end

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
MERGED = [file for file in RECIPES if "[tuned]" in file.read_text("utf-8")]
BACKBONES = ("clip-vit-base-patch32", "clip-vit-base-patch16", "clip-vit-large-patch14")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_recipe_parses_and_its_tasks_are_built_in(file: Path) -> None:
    recipe = recipe_of(file)
    assert recipe.base is not None
    assert set(recipe.tuned) <= set(names())
    assert set(expand(recipe.eval_tasks, recipe)) <= set(names())


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_recipe_begins_with_the_commands_that_use_it(file: Path) -> None:
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    commands = ("merge", "eval") if file in MERGED else ("fetch", "finetune")
    for command in commands:
        assert any(f"mergecli {command} " in line and f"recipes/{file.name}" in line for line in head), (
            command
        )


@pytest.mark.parametrize("file", MERGED, ids=lambda file: file.name)
def test_the_model_of_a_task_is_the_model_of_that_task(file: Path) -> None:
    for task, source in recipe_of(file).tuned.items():
        assert str(source).removesuffix("_lora-16").endswith(task)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_recipe_uses_one_backbone_and_knows_its_name_on_both_hubs(file: Path) -> None:
    recipe = recipe_of(file)
    backbone = next((name for name in BACKBONES if file.stem.startswith(name)), None)
    if backbone is None:
        assert file.stem == "toy"
        return
    assert recipe.base is not None
    assert (str(recipe.base), recipe.base.modelscope) == (
        f"hf:openai/{backbone}",
        f"openai-mirror/{backbone}",
    )
    for source in recipe.tuned.values():
        assert source.kind == "path" or source.name.startswith(f"tanganke/{backbone}_")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("tasks", ["ta8", "tall14", "tall20"])
def test_there_is_a_recipe_for_every_backbone_and_set_of_tasks(backbone: str, tasks: str) -> None:
    recipe = recipe_of(RECIPES[0].parent / f"{backbone}-{tasks}.toml")
    assert tuple(recipe.tuned) == expand((tasks,)) == expand(recipe.eval_tasks, recipe)


@pytest.mark.parametrize("file", MERGED, ids=lambda file: file.name)
def test_make_shows_the_plan_of_a_recipe(file: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-n", "-C", str(file.parent), f"RECIPE={file.name}", f"OUT={tmp_path}"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, without_end(done.stderr)) == (0, "")
    for part in ("taskvector", "cos-sim", "merge", "eval", "report"):
        assert f"mergecli {part}" in done.stdout
    assert ("mergecli fetch" in done.stdout) == (file.stem != "toy")


def test_make_shows_the_plan_of_every_table(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-n", "-C", str(RECIPES[0].parent), "tables", f"OUT={tmp_path}/%"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, without_end(done.stderr)) == (0, "")
    for file in MERGED:
        assert file.stem == "toy" or f"RECIPE={file.name}" in done.stdout
    assert done.stdout.count("--split contrast") > 10
    assert "mergecli report" in done.stdout
    assert set(re.findall(r"--reference (\S+)", done.stdout)) == set(references.names())


def test_every_evaluation_of_the_tables_runs_through_the_engine(tmp_path: Path) -> None:
    options = ["ENGINE=--engine ray --address auto --device cuda", "MERGE=--device cuda:0"]
    done = subprocess.run(
        ["make", "-n", "-C", str(RECIPES[0].parent), "tables", f"OUT={tmp_path}/%", *options],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, without_end(done.stderr)) == (0, "")
    evaluations = re.findall(r"mergecli eval .*", done.stdout)
    assert len(evaluations) > 29 * 10
    assert all(" --engine ray --address auto --device cuda " in each for each in evaluations)
    merges = re.findall(r"mergecli merge (?:.*\\\n)*.*", done.stdout)
    assert len(merges) > 29 * 10
    assert all(" --device cuda:0 " in each for each in merges)
