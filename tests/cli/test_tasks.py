"""`mergecli tasks NAME --recipe RECIPE`: what was found for a task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.data.test_inventory import put

RECIPE = """
[tasks.birds]
data = "data"
templates = ["a photo of a {}."]
classes = { "n02" = "wren", "n01" = "robin" }
"""


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    put(
        tmp_path / "data",
        "test/n01/0.png",
        "test/n02/0.png",
        "test/n02/1.png",
        "train/n01/0.png",
        "test/more.png",
    )
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


def test_it_shows_both_names_the_counts_and_what_was_left_out(birds: Path, run: Run) -> None:
    ended = run("tasks", "birds", "--recipe", "r.toml", "--plot", "sheet.png")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.split("\n\n", 2)[2] == (
        "split `test`: 3 images, 2 classes (as the recipe maps them)\n"
        "left out 1 file: 1 image\n"
        "  label  images  in the data  in the prompts\n"
        "      0       2  n02          wren\n"
        "      1       1  n01          robin\n"
        "\n"
        "split `train`: 1 images, 2 classes (as the recipe maps them)\n"
        "  label  images  in the data  in the prompts\n"
        "      0       0  n02          wren\n"
        "      1       1  n01          robin\n"
    )
    assert (birds / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_it_is_json_too(birds: Path, run: Run) -> None:
    found = json.loads(run("tasks", "birds", "--recipe", "r.toml", "--json").out)["found"]
    assert [(each["split"], each["images"]) for each in found] == [("test", 3), ("train", 1)]
    assert found[0]["classes"][0] == {"label": 0, "data_names": ["n02"], "name": "wren", "images": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["birds", "--plot", "a.png"], "error: --plot: there are no images to draw\n"),
        (["--recipe", "r.toml"], "error: --recipe: of which task?\n"),
        (["birds", "--recipe", "r.toml", "--plot", "a.svg"], "error: a.svg: expected a .png or .pdf file\n"),
    ],
)
def test_what_cannot_be_shown_is_said(birds: Path, run: Run, arguments: list[str], message: str) -> None:
    ended = run("tasks", *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith(message)


def test_food101_says_in_which_order_its_published_models_were_trained(run: Run) -> None:
    assert run("tasks", "food101").out.splitlines()[-1] == (
        "names    published models were trained with `cheesecake` as `cheese plate`, `cheese plate` as `cheesecake`. Images are "
        'scored by the data\'s names; `names = "published"` under `[tasks.food101]` scores them as those models were trained.'
    )
    assert "names    " not in run("tasks", "eurosat").out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('match = "nmae"', "`tasks.birds.match`: expected `name` or `position`, got `nmae`"),
        ('names = "published"', "`tasks.birds.names`: only built-in tasks have published names"),
        ('match = "position"', "`tasks.birds.match`: `classes` says already which name is which"),
        ("image = 3", "`tasks.birds.image`: expected a string, got 3"),
    ],
)
def test_a_task_s_table_is_checked(birds: Path, run: Run, line: str, message: str) -> None:
    (birds / "r.toml").write_text(RECIPE + line + "\n")
    ended = run("tasks", "birds", "--recipe", "r.toml")
    assert (ended.status, ended.out) == (2, "")
    assert message in ended.err


@pytest.mark.parametrize("classes", ["{}", '{ "n01" = 3 }', "3"])
def test_classes_are_a_list_or_a_table_of_names(birds: Path, run: Run, classes: str) -> None:
    (birds / "r.toml").write_text(RECIPE.replace('{ "n02" = "wren", "n01" = "robin" }', classes))
    ended = run("tasks", "birds", "--recipe", "r.toml")
    assert (ended.status, ended.out) == (2, "")
    assert "`tasks.birds.classes" in ended.err
