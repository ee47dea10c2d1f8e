"""The methods to try first with what a recipe has."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mergecli import methods
from mergecli.merging.recommend import PATH, recommend
from mergecli.runtime.errors import UsageError
from tests.conftest import Run

ROWS: list[dict[str, Any]] = tomllib.loads(PATH.read_text("utf-8"))["method"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['name']} {row.get('tasks', '')}")
def test_a_row_names_a_method_with_settings_that_it_has_and_what_is_true_of_it(row: dict[str, Any]) -> None:
    method = methods.create(row["name"], row.get("settings", {}))
    assert (row["images"] == "none") == (method.looks_at == "no images")
    kind = type(method).kind
    assert row["output"] == {"routed": "routed", "task-conditioned": "told"}.get(kind, "tower")
    assert row["why"]


def recipe(folder: Path, tasks: int, text: str = "") -> Path:
    lines = [f't{number} = "t{number}.safetensors"' for number in range(tasks)]
    (folder / "r.toml").write_text("\n".join(['base = "base"', "[tuned]", *lines, text]) + "\n")
    return folder / "r.toml"


def test_the_toys_have_images_and_get_methods_that_look_at_them() -> None:
    found = recommend(
        "toy.toml" if Path("toy.toml").exists() else Path(__file__).parents[2] / "recipes/toy.toml"
    )
    assert (found.tasks, found.adapters, found.with_images, found.images) == (8, 0, 8, "unlabeled")
    assert [each.method for each in found.suggestions] == ["esm", "ada_merging", "lot"]
    larger = recommend(Path(__file__).parents[2] / "recipes/toy.toml", may_grow=True).suggestions
    assert [each.method for each in larger] == ["esm_plus_plus", "sy_merge", "weight_ensembling_moe"]


@pytest.mark.parametrize(
    ("tasks", "grows", "names"),
    [
        (8, False, ["tsv_m", "iso_cts", "act_mat"]),
        (20, False, ["iso_cts", "act_mat", "wudi"]),
        (2, False, ["tsv_m", "act_mat", "wudi"]),
        (8, True, ["emr", "tsv_c", "smile"]),
    ],
)
def test_without_images_weights_alone_are_merged(
    tmp_path: Path, tasks: int, grows: bool, names: list[str]
) -> None:
    found = recommend(recipe(tmp_path, tasks), may_grow=grows)
    assert (found.tasks, found.with_images, found.images) == (tasks, 0, "none")
    assert [each.method for each in found.suggestions] == names


def test_adapters_get_what_does_not_hurt_them(tmp_path: Path) -> None:
    path = recipe(tmp_path, 3)
    for number in range(3):
        (tmp_path / f"a{number}").mkdir()
        (tmp_path / f"a{number}/adapter_config.json").write_text("{}")
    path.write_text(path.read_text().replace('"t', '"a').replace(".safetensors", ""))
    found = recommend(path)
    assert found.adapters == 3
    assert found.suggestions[0].method == "act_mat"
    assert "iso_cts" not in [each.method for each in recommend(path, most=100).suggestions]


def test_the_program_prints_options_that_merge_takes(run: Run, tmp_path: Path) -> None:
    path = recipe(tmp_path, 8)
    done = run("methods", "--recommend", str(path), "--format", "json")
    assert done.status == 0
    rows = json.loads(done.out)
    assert rows[2]["options of merge"] == "--method act_mat --set 'method.density=0.5'"
    assert "8 models, 0 of them adapters; 0 tasks have images here" in done.err


def test_wrong_options_are_refused(run: Run, tmp_path: Path) -> None:
    path = str(recipe(tmp_path, 8))
    for arguments, message in (
        (["ties", "--recommend", path], "error: --recommend: it takes no method, got `ties`"),
        (["--may-grow"], "error: --images and --may-grow are options of --recommend"),
        (
            ["--recommend", path, "--images", "some"],
            "error: --images: expected `none` or `unlabeled`, got `some`",
        ),
    ):
        done = run("methods", *arguments)
        assert (done.status, done.err.splitlines()[0]) == (2, message)
    with pytest.raises(UsageError, match="there are no fine-tuned models to merge"):
        recommend(recipe(tmp_path, 0))
