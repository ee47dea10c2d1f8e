"""Every shipped recipe parses and names what exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mergecli.data.pools import pool_of, pools
from mergecli.data.tasks import expand, names
from mergecli.recipe.reading import recipe_of
from mergecli.results import references
from tests.conftest import without_end

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
MERGED = [file for file in RECIPES if "[tuned]" in file.read_text("utf-8")]
POOL = re.compile(r"-(ta|tall)-pool(-\d+)?$")
"""Recipes of models for open_clip."""
OF_OPEN_CLIP = {
    "stanford-cars": "cars",
    "oxford_flowers102": "flowers102",
    "emnist_digits": "emnist",
}
"""Task -> what open_clip's pools call it, where that is not its name in lower case."""
BACKBONES = ("clip-vit-base-patch32", "clip-vit-base-patch16", "clip-vit-large-patch14")


def plain(name: str) -> str:
    return re.sub("[-_]", "", name).lower()


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_recipe_parses_and_its_tasks_are_built_in(file: Path) -> None:
    recipe = recipe_of(file)
    assert recipe.base is not None
    assert set(recipe.tuned) - {"emnist_digits"} <= set(names())
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
        if POOL.search(file.stem):
            (folder,) = re.findall(r"([^/]+)/(?:nonlinear_)?finetuned\.\w+$", str(source))
            assert plain(folder.removesuffix("Val")) == OF_OPEN_CLIP.get(task, plain(task))
        else:
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
    model = {"32": "ViT-B-32", "16": "ViT-B-16", "14": "ViT-L-14"}[backbone[-2:]]
    for source in recipe.tuned.values():
        if POOL.search(file.stem):
            assert (source.kind, source.name) == ("hf", "nik-dim/tall_masks") or source.kind == "path"
            assert f"/{model}/" in str(source)
        else:
            assert source.kind == "path" or source.name.startswith(f"tanganke/{backbone}_")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("tasks", ["ta8", "tall14", "tall20"])
def test_there_is_a_recipe_for_every_backbone_and_set_of_tasks(backbone: str, tasks: str) -> None:
    recipe = recipe_of(RECIPES[0].parent / f"{backbone}-{tasks}.toml")
    assert tuple(recipe.tuned) == expand((tasks,)) == expand(recipe.eval_tasks, recipe)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("end", "count"), [("", 8), ("-14", 14), ("-20", 20)])
def test_there_is_a_recipe_for_every_backbone_and_size_of_the_pool_of_tall_masks(
    backbone: str, end: str, count: int
) -> None:
    recipe = recipe_of(RECIPES[0].parent / f"{backbone}-tall-pool{end}.toml")
    tasks = [*expand(("tall20",))]
    tasks[tasks.index("emnist_letters")] = "emnist_digits"
    assert list(recipe.tuned) == tasks[:count]
    assert [*expand(recipe.eval_tasks, recipe)] == [each for each in tasks[:count] if each != "emnist_digits"]
    assert recipe.pool == "tall"


def test_a_recipe_of_a_pool_says_which_and_others_are_known_by_their_models() -> None:
    for file in MERGED:
        recipe = recipe_of(file)
        known = pool_of(str(source) for source in recipe.tuned.values())
        pool = recipe.pool or known
        where = "ta" if file.stem.endswith("-ta-pool") else "tall" if POOL.search(file.stem) else "fb"
        assert (
            file.stem in ("toy", "clip-vit-base-patch16-l-lora")
            or pool
            == {
                "ta": "task_arithmetic",
                "tall": "tall",
                "fb": "fusion_bench",
            }[where]
        )
        assert pool is None or pool in pools()


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
    with_recipe = {
        name for name in references.names() if not references.find(name).averaged or name.endswith("-ta-pool")
    }
    assert set(re.findall(r"--reference (\S+)", done.stdout)) == with_recipe


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
