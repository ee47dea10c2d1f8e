"""taskvector, cos-sim, info, methods, tasks, fetch and completion as real processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mergecli import methods
from tests.conftest import Run, World


def test_taskvector_prints_one_path_a_line_in_the_recipes_order(world: World, run: Run) -> None:
    (world.folder / "r.toml").write_text(
        'base = "base.safetensors"\n[tuned]\nz = "t1.safetensors"\na = "t2.safetensors"\n'
    )
    ended = run("taskvector", "r.toml", "-o", "tv/")
    assert (ended.status, ended.out, ended.err) == (0, "tv/z.safetensors\ntv/a.safetensors\n", "")
    assert json.loads(run("info", "tv/z.safetensors", "--json").out)["kind"] == "task vector"


def test_cos_sim_writes_csv_and_heat_map_and_prints_the_table(world: World, run: Run) -> None:
    ended = run(
        "cos-sim",
        "--base",
        "base.safetensors",
        "t1.safetensors",
        "t2.safetensors",
        "-o",
        "c.csv",
        "--plot",
        "c.png",
    )
    assert (ended.status, ended.err) == (0, "")
    rows = list(csv.reader((world.folder / "c.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["", "t1", "t2"]
    assert (world.folder / "c.png").read_bytes().startswith(b"\x89PNG")
    assert ended.out.splitlines()[1].split("\t")[:2] == ["t1", "1"]


def test_info_warns_of_a_model_that_may_have_been_trained_on_test_images_and_of_its_merges(
    world: World, run: Run
) -> None:
    old = world.folder / "ViT-B-32" / "DTDVal" / "nonlinear_finetuned.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes((world.folder / "t1.safetensors").read_bytes())
    why = (
        "may have been trained on test images of `dtd`: the versions of the TALL pool before 13 December 2024 were "
        "(nik-dim/tall_masks, issue 1)"
    )
    ended = run("info", "ViT-B-32/DTDVal/nonlinear_finetuned.safetensors")
    assert (ended.status, ended.err) == (
        0,
        f"warning: ViT-B-32/DTDVal/nonlinear_finetuned.safetensors: {why}\n",
    )
    recipe = '[tuned]\ndtd = "hf:nik-dim/tall_masks#single_task/ViT-B-32/DTDVal/nonlinear_finetuned.pt"'
    save_file(
        load_file(old),
        world.folder / "merge.safetensors",
        {"mergecli": "0", "kind": "checkpoint", "recipe": recipe},
    )
    assert run("info", "merge.safetensors").err == f"warning: merge.safetensors: {why}\n"
    told = json.loads(run("info", "ViT-B-32/DTDVal/nonlinear_finetuned.safetensors", "--json").out)
    assert told["warnings"] == [why]
    assert run("info", "t1.safetensors").err == ""


def test_info_counts_parameters_and_lists_keys(world: World, run: Run) -> None:
    facts = dict(line.split("\t") for line in run("info", "base.safetensors").out.splitlines())
    assert facts["parameters"] == f"{7 * 5 + 7 + 1 + 0 + 96 + 5000:,}"
    assert facts["tensors"] == "7"
    keys = [line.split("\t") for line in run("info", "base.safetensors", "--keys").out.splitlines()]
    assert ["conv", "F32", "3x2x4x4"] in keys


def test_a_file_of_another_program_has_no_recipe(world: World, run: Run) -> None:
    ended = run("info", "base.safetensors", "--recipe")
    assert (ended.status, ended.out) == (3, "")
    assert ended.err == (
        "error: base.safetensors: holds no recipe\n"
        "hint: it was made by another program; `merge`, `taskvector` and `extract` write their recipe into the file\n"
    )


def test_methods_lists_every_method_and_shows_one(run: Run) -> None:
    rows = [line.split("\t") for line in run("methods").out.splitlines()]
    assert rows[0] == ["method", "what it does", "cost"]
    assert {"average", "weighted_average", "task_arithmetic", "ties"} <= {row[0] for row in rows}
    shown = run("methods", "ties").out
    assert "theta = theta_0 + lambda tau" in shown
    assert "method.density  a number in (0, 1]; default 0.2" in shown
    assert "arXiv 2306.01708" in shown
    described = json.loads(run("methods", "ties", "--json").out)
    assert [each["name"] for each in described["settings"]][:2] == ["scaling_factor", "density"]


def test_a_method_in_a_default_is_a_table_in_json(run: Run) -> None:
    for name, setting in {"dare": "of", "lines": "of", "svc": "of"}.items():
        ended = run("methods", name, "--json")
        assert (ended.status, ended.err) == (0, "")
        (default,) = [
            each["default"] for each in json.loads(ended.out)["settings"] if each["name"] == setting
        ]
        assert default["name"] in methods.names()


def test_tasks_lists_the_twenty_tasks_a_set_and_one(run: Run) -> None:
    rows = [line.split("\t") for line in run("tasks").out.splitlines()]
    assert [row[0] for row in rows[1:9]] == [
        "sun397",
        "stanford-cars",
        "resisc45",
        "eurosat",
        "svhn",
        "gtsrb",
        "mnist",
        "dtd",
    ]
    assert rows[1][1] == "397"
    assert len(run("tasks", "ta8").out.splitlines()) == 9
    assert json.loads(run("tasks", "mnist", "--json").out)["templates"] == ['a photo of the number: "{}".']


def test_fetch_prints_where_toys_and_files_lie(world: World, run: Run) -> None:
    ended = run("fetch", "toy:base", "t1.safetensors")
    assert (ended.status, ended.err) == (0, "")
    toy, file = ended.out.splitlines()
    assert (Path(toy) / "config.json").is_file()
    assert file == "t1.safetensors"


def test_what_is_not_in_the_store_is_a_hub_error(run: Run, tmp_path: Path) -> None:
    ended = run("fetch", "--offline", "hf:org/name", MERGECLI_HOME=str(tmp_path))
    assert (ended.status, ended.out) == (4, "")
    assert ended.err.startswith("error: hf:org/name: has not been fetched")


def test_the_version_names_what_matters(run: Run) -> None:
    assert run("--version").out.startswith("mergecli 0.1.0, torch 2.")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mergecli mer", {"merge"}),
        ("mergecli merge --method ti", {"ties"}),
        ("mergecli methods task", {"task_arithmetic"}),
        ("mergecli tasks eu", {"eurosat"}),
        ("mergecli eval --task mnist,eu", {"mnist,eurosat"}),
        (
            "mergecli report --reference clip-vit-large-patch14-ta8",
            {"clip-vit-large-patch14-ta8", "clip-vit-large-patch14-ta8-averages"},
        ),
    ],
)
def test_the_shell_completes_commands_methods_and_tasks(
    line: str, expected: set[str], tmp_path: Path
) -> None:
    words = line.split()
    done = subprocess.run(
        [str(Path(sys.executable).parent / "mergecli")], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"_MERGECLI_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
    )  # fmt: skip
    assert set(done.stdout.split()) == expected, done.stderr
