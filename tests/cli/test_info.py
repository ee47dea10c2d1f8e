"""`mergecli info` of several files, and of learned coefficients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mergecli
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.metadata import about
from mergecli.storage.safetensors_writer import save_tensors
from mergecli.storage.store import home
from tests.conftest import Run, World

NAMES = ("embeddings.weight", "layers.0.a", "layers.0.b", "layers.10.a", "layers.2.a", "post_layernorm.bias")
TABLE = torch.tensor([[0.1, 0.2, 0.4, 0.5, 0.6, 0.7], [0.0, 0.1, 0.2, 0.3, 0.4, -0.5]])
ROWS = [
    ["layer", "one", "two"], ["before", "0.1", "0"], ["0", "0.3", "0.15"], ["2", "0.6", "0.4"], ["10", "0.5", "0.3"],
    ["after", "0.7", "-0.5"],
]  # fmt: skip


def learned(path: Path, table: torch.Tensor = TABLE, **others: str) -> Path:
    """A file of coefficients of two tasks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"tasks": json.dumps(["one", "two"]), "tensors": json.dumps(NAMES), **others}
    save_tensors(
        {"coefficients": table}, path, about("coefficients", method="ada_merging", **facts), checked=True
    )
    return path


def cells(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def test_coefficients_are_means_of_each_layer_for_each_task(run: Run, tmp_path: Path) -> None:
    learned(tmp_path / "c.safetensors")
    ended = run("info", "c.safetensors", "--coefficients")
    assert (ended.status, ended.err) == (0, "")
    assert cells(ended.out) == ROWS
    found = json.loads(run("info", "c.safetensors", "--json").out)["coefficients"]
    assert found["tasks"] == ["one", "two"]
    assert found["tensors"]["layers.0.b"] == pytest.approx([0.4, 0.2])


def test_one_coefficient_for_each_task_is_one_row(run: Run, tmp_path: Path) -> None:
    learned(tmp_path / "c.safetensors", TABLE[:, :1])
    assert cells(run("info", "c.safetensors", "--coefficients").out) == [
        ["layer", "one", "two"],
        ["all", "0.1", "0"],
    ]


def test_a_terminal_shows_them_below_the_facts(run: Run, tmp_path: Path) -> None:
    learned(tmp_path / "c.safetensors")
    shown = run("info", "c.safetensors", "--format", "table", COLUMNS=80).out
    assert shown.endswith(
        "\n learned coefficients\n"
        " layer       one       two\n"
        " ─────────────────────────\n"
        " before   0.1000    0.0000\n"
        " 0        0.3000    0.1500\n"
        " 2        0.6000    0.4000\n"
        " 10       0.5000    0.3000\n"
        " after    0.7000   -0.5000\n\n"
    )
    assert cells(run("info", "c.safetensors").out)[1] == [
        "path",
        "c.safetensors",
    ]  # a pipe gets the facts alone


@pytest.mark.usefixtures("own_store")
def test_of_what_was_merged_with_them_they_are_found_in_the_store(run: Run, tmp_path: Path) -> None:
    kept = learned(tmp_path / "kept.safetensors")
    with open_checkpoint(kept) as stored:
        digest = stored.digest()
    facts = about("checkpoint", method="ada_merging", inputs={"coefficients": digest})
    save_tensors({"w": torch.zeros(1)}, tmp_path / "m.safetensors", facts)
    command = ("info", "m.safetensors", "--coefficients")
    lost = run(*command, MERGECLI_HOME=tmp_path / "home")
    assert (lost.status, lost.out) == (3, "")
    assert lost.err == (
        f"error: m.safetensors: the coefficients that it was merged with ({digest}) are not in the store\n"
        "hint: name the file of them, which `mergecli merge --save-coefficients` writes\n"
    )
    learned(home() / "coefficients/ada_merging/other.safetensors", TABLE + 1)
    (home() / "coefficients/ada_merging/damaged.safetensors").write_bytes(b"none")
    kept.rename(home() / "coefficients/ada_merging/kept.safetensors")
    assert cells(run(*command).out) == ROWS


def test_the_plot_is_a_heat_map(run: Run, tmp_path: Path) -> None:
    learned(tmp_path / "c.safetensors")
    assert run("info", "c.safetensors", "--plot", "c.svg").status == 0
    assert "<svg" in (tmp_path / "c.svg").read_text()
    assert mergecli.info(tmp_path / "c.safetensors", plot=tmp_path / "c.png").coefficients is not None
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["base.safetensors", "--coefficients"], 3, "base.safetensors: has no learned coefficients"),
        (["base.safetensors", "--plot", "a.png"], 3, "base.safetensors: has no learned coefficients"),
        (["base.safetensors", "--plot", "a.gif"], 2, "a.gif: expected a .png, .svg or .pdf file"),
        (["base.safetensors", "t1.safetensors", "--plot", "a.png"], 2, "--plot: is of one file, got 2"),
        (["base.safetensors", "t1.safetensors", "--recipe"], 2, "--recipe: is of one file, got 2"),
        (["base.safetensors", "gone.safetensors"], 3, "gone.safetensors: no such file or folder"),
    ],
)
def test_what_cannot_be_shown_is_said(
    world: World, run: Run, arguments: list[str], status: int, message: str
) -> None:
    ended = run("info", *arguments)
    assert (ended.status, ended.out) == (status, "")
    assert ended.err.startswith(f"error: {message}\n")
    assert not (world.folder / "a.png").exists()


def test_coefficients_that_do_not_fit_their_metadata_are_refused(run: Run, tmp_path: Path) -> None:
    learned(tmp_path / "c.safetensors", tensors='["one"]')
    ended = run("info", "c.safetensors")
    assert (ended.status, ended.err) == (3, "error: c.safetensors: is not what its metadata says\n")


def test_several_files_are_side_by_side(world: World, run: Run) -> None:
    run("taskvector", "t1.safetensors", "--base", "base.safetensors", "-o", "v.safetensors")
    ended = run("info", "t1.safetensors", "v.safetensors")
    assert (ended.status, ended.err) == (0, "")
    rows = {row[0]: row[1:] for row in cells(ended.out)}
    assert rows["fact"] == ["t1.safetensors", "v.safetensors"]
    assert rows["kind"] == ["checkpoint", "task vector"]
    one = dict(cells(run("info", "v.safetensors").out))
    assert rows["digest"][1] == one["digest"]
    assert rows["written by"] == ["", one["written by"]]
    both = json.loads(run("info", "t1.safetensors", "v.safetensors", "--json").out)
    assert [each["digest"] for each in both] == rows["digest"]


def test_on_a_terminal_their_digests_are_short_and_further_files_are_below(world: World, run: Run) -> None:
    names = [f"t{each}.safetensors" for each in (1, 2, 3)]
    digest = dict(cells(run("info", names[0]).out))["digest"]
    shown = run("info", *names, "--format", "table", COLUMNS=60).out
    heads = [line.split() for line in shown.splitlines() if line.startswith(" fact")]
    assert [name for head in heads for name in head[1:]] == names
    assert f"{digest[:17]}…" in shown
    assert digest not in shown


def test_tensors_of_several_files_are_side_by_side(world: World, run: Run) -> None:
    save_tensors({"scale": torch.zeros(2)}, world.folder / "s.safetensors", {})
    rows = cells(run("info", "base.safetensors", "s.safetensors", "--keys").out)
    assert rows[0] == ["tensor", "base.safetensors", "s.safetensors"]
    assert ["scale", "F32", "F32 2"] in rows
    assert ["conv", "F32 3x2x4x4", ""] in rows


def test_settings_by_layer_are_shown_and_recorded_in_results(world: World, run: Run) -> None:
    recipe = """base = "base.safetensors"
[tuned]
t1 = "t1.safetensors"
[method]
name = "task_arithmetic"
[[method.layers]]
match = "layer"
scaling_factor = { first = 0.1, last = 0.2 }
[[method.layers]]
match = ["conv", "zz*"]
keep = "t1"
"""
    (world.folder / "r.toml").write_text(recipe)
    assert run("merge", "r.toml", "-o", "out/").status == 0
    table = run("info", "out", "--format", "md").out
    assert "| layers layer | scaling_factor = { first = 0.1, last = 0.2 } |" in table
    assert r'| layers conv, zz\* | keep = "t1" |' in table
    shown = recipe[recipe.index("[[") :].replace("\n[[", "\n\n[[")
    assert shown in run("info", "out", "--recipe").out
    assert shown in (world.folder / "out" / "README.md").read_text()
    described = json.loads(run("methods", "task_arithmetic", "--json").out)
    assert (described["settings"][0]["by_layer"], described["layers"]) == (
        True,
        "every setting may differ by layer",
    )
