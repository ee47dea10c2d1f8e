"""Files of more than one tower, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mergecli
from tests.conftest import Run

TWO = {"digits": "toy:digits", "shapes": "toy:shapes"}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with `emr.safetensors` and `smile.safetensors`, each of two toys."""
    for method in ("emr", "smile"):
        mergecli.merge(TWO, base="toy:base", method=method, output=tmp_path / f"{method}.safetensors")
    return tmp_path


def test_mixtures_are_evaluated_and_reported_with_their_size_and_routes(files: Path, run: Run) -> None:
    done = run(
        "eval", "smile.safetensors", "emr.safetensors", "toy:base", "--clip", "toy:base", "--task", "digits,shapes",
        "--limit", 8, "--routes", "routes", "-o", "out",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert done.out.splitlines()[0] == "model\tmethod\tsize\trouting\tdigits\tshapes\taverage"
    heads, *rows = (files / "routes" / "smile.csv").read_text().splitlines()
    assert heads == "task,layer,digits,shapes"
    assert {row.split(",")[0] for row in rows} == {"digits", "shapes"}
    assert {file.name for file in (files / "routes").iterdir()} == {"smile.csv", "smile.png"}
    refused = run("eval", "smile.safetensors", "--clip", "toy:base", "--task", "digits", "--routing", "batch")
    assert (refused.status, refused.out) == (2, "")
    assert refused.err.startswith(
        "error: --routing: none of the checkpoints holds a tower that routes batches"
    )
    result = json.loads((files / "out" / "smile.json").read_text())
    assert result["checkpoint"]["routing"] == "sample"
    assert result["model_info"]["relative_size"] > 1
    page = run("report", "out/smile.json", "out/base.json", "-o", "r.html")
    assert page.status == 0, page.err
    assert f">{result['model_info']['relative_size']:.2f}</td>" in (files / "r.html").read_text()


def test_one_tower_of_a_mixture_is_named_by_its_task(files: Path, run: Run) -> None:
    done = run("info", "emr.safetensors#digits")
    assert " bytes if it had a file of its own, in the dtypes of the whole\n" in done.out
    done = run("info", "emr.safetensors")
    assert "kind\tmixture\n" in done.out
    assert "tasks\tdigits, shapes\nrouting\tneeds the task\n" in done.out
    refused = run("merge", "--base", "toy:base", "a=emr.safetensors", "toy:letters", "--method", "average", "-o", "m.safetensors")  # fmt: skip
    assert (refused.status, refused.out) == (3, "")
    assert refused.err == (
        "error: emr.safetensors: holds towers for digits, shapes, and one tower is needed\n"
        "hint: name one as `emr.safetensors#digits`\n"
    )
    done = run("merge", "--base", "toy:base", "a=emr.safetensors#digits", "toy:letters", "--method", "average", "-o", "m.safetensors")  # fmt: skip
    assert done.status == 0, done.err


@pytest.mark.parametrize("of", ["emr", "smile", "tall_mask"])
def test_a_method_that_writes_several_towers_cannot_be_changed_by_another(run: Run, of: str) -> None:
    ended = run(
        "merge", "--base", "toy:base", "toy:digits", "--method", "dare", "--set", f'method.of={{name="{of}"}}', "-o", "x.safetensors"
    )  # fmt: skip
    assert (ended.status, ended.out) == (2, "")
    assert (
        f"`method.of.name`: `{of}` writes more than one tower, and cannot be changed by another" in ended.err
    )
    assert "Traceback" not in ended.err


def test_a_folder_for_transformers_cannot_hold_several_towers(run: Run, tmp_path: Path) -> None:
    ended = run("merge", "--base", "toy:base", "toy:digits", "--method", "emr", "-o", "folder")
    assert (ended.status, ended.out) == (2, "")
    assert "folder: `emr` writes more than one tower" in ended.err
    assert not (tmp_path / "folder").exists()


def test_a_file_of_ours_of_an_unknown_kind_is_shown_and_refused_as_a_model(files: Path, run: Run) -> None:
    with safe_open(files / "emr.safetensors", "pt") as stored:
        about: dict[str, str] = stored.metadata()
    save_file(load_file(files / "emr.safetensors"), files / "later.safetensors", {**about, "kind": "banana"})
    assert "kind\tbanana (no model that this version knows)\n" in run("info", "later.safetensors").out
    refused = run("eval", "later.safetensors", "--clip", "toy:base", "--task", "digits")
    assert (refused.status, refused.out) == (3, "")
    assert refused.err == (
        "error: later.safetensors: its kind: expected checkpoint, task vector or mixture, got `banana`\n"
        "hint: it holds no model, or was written by a later version: `mergecli info` says by which\n"
    )
