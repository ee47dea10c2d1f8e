from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import Run, without_counts
from tests.support.tiny_clip import make_image_task, make_tiny_clip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, two towers named after their tasks, and a recipe that knows them."""
    tmp_path = tmp_path_factory.mktemp("original")
    make_tiny_clip(tmp_path / "base")
    for seed, name in enumerate(("warm", "cold"), 1):
        weights = load_file(make_tiny_clip(tmp_path / f"clip-{name}", seed) / "model.safetensors")
        tower = {key: value for key, value in weights.items() if key.startswith("vision_model.")}
        save_file(tower, tmp_path / f"{name}.safetensors", metadata={"format": "pt"})
        make_image_task(tmp_path / "data" / name, seed=seed)
    tasks = "".join(
        f'[tasks.{name}]\ndata = "data/{name}"\ntemplates = ["a {{}} thing"]\n' for name in ("warm", "cold")
    )
    (tmp_path / "r.toml").write_text(
        f'base = "base"\n[tuned]\nwarm = "warm.safetensors"\ncold = "cold.safetensors"\n{tasks}[eval]\nbatch_size = 5\n'
    )
    return tmp_path


@pytest.fixture
def place(original: Path, tmp_path: Path) -> Path:
    """A copy of it for the test alone."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_result_is_a_table_on_stdout_and_json_on_disk(place: Path, run: Run) -> None:
    ended = run("eval", "warm.safetensors", "--recipe", "r.toml", "-o", "out/warm.json")
    assert (ended.status, ended.rest) == (0, "")
    header, row = (line.split("\t") for line in ended.out.splitlines())
    assert header == ["model", "method", "warm", "cold", "average"]
    written = json.loads((place / "out/warm.json").read_text())
    assert written["schema"] == "mergecli.eval/1"
    assert row[0] == written["checkpoint"]["name"] == "warm"
    assert float(row[2]) == pytest.approx(written["tasks"]["warm"]["accuracy"], rel=1e-5)
    for score in written["tasks"].values():
        assert score["accuracy"] == score["correct"] / score["images"]
    assert str(place) not in json.dumps(written)


def test_without_a_checkpoint_every_model_of_the_recipe_is_evaluated(place: Path, run: Run) -> None:
    ended = run("eval", "--recipe", "r.toml", "-o", "out/")
    assert [line.split("\t")[0] for line in ended.out.splitlines()] == ["model", "base", "warm", "cold"]
    assert sorted(file.name for file in (place / "out").glob("*.json")) == [
        "base.json",
        "cold.json",
        "warm.json",
    ]


def test_only_chooses_among_the_recipes_models(place: Path, run: Run) -> None:
    ended = run("eval", "--model", "base,cold", "--recipe", "r.toml")
    assert [line.split("\t")[0] for line in ended.out.splitlines()] == ["model", "base", "cold"]
    ended = run("eval", "--model", "clod", "--recipe", "r.toml")
    assert (ended.status, ended.rest) == (2, "error: the recipe has no model `clod` (did you mean `cold`?)\n")


def test_ensembles_are_further_rows_and_files(place: Path, run: Run) -> None:
    weights = ("--ensemble-weight", "warm=1", "--ensemble-weight", "cold=3")
    ended = run("eval", "--recipe", "r.toml", "--ensemble", "logits,weighted", *weights, "-o", "out")
    assert ended.status == 0
    rows = [line.split("\t") for line in ended.out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["base", "warm", "cold", "ensemble-logits", "ensemble-weighted"]
    assert [row[1] for row in rows[3:]] == ["ensemble"] * 2
    assert [float(row[2]) for row in rows] == [1, 1, 1, 2, 2]
    assert "evaluated 3 checkpoints on 2 tasks, wrote 5 files in out" in ended.end
    written = json.loads((place / "out" / "ensemble-weighted.json").read_text())
    assert written["checkpoint"]["ensemble.weights"] == "warm 0.25, cold 0.75"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("warm", "error: --ensemble-weight warm: expected `NAME=X` with a number X of at least 0\n"),
        ("warm=inf", "error: --ensemble-weight warm=inf: expected `NAME=X` with a number X of at least 0\n"),
        ("cold=2", "error: --ensemble-weight cold=2: `cold` has one already, 1\n"),
    ],
)
def test_weights_of_ensembles_are_numbers_each_given_once(run: Run, text: str, message: str) -> None:
    ended = run("eval", "--ensemble", "weighted", "--ensemble-weight", "cold=1", "--ensemble-weight", text)
    assert (ended.status, ended.err) == (2, message)


def test_individual_takes_each_model_on_its_own_task_into_one_result(place: Path, run: Run) -> None:
    run("eval", "--recipe", "r.toml", "-o", "out/")
    ended = run("eval", "--individual", "--recipe", "r.toml", "-o", "own.json")
    assert (ended.status, ended.rest) == (0, "")
    own = json.loads((place / "own.json").read_text())
    assert own["checkpoint"]["name"] == "fine-tuned"
    for task in ("warm", "cold"):
        whole = json.loads((place / f"out/{task}.json").read_text())
        assert own["tasks"][task] == whole["tasks"][task]


def test_the_same_model_through_a_file_a_folder_and_a_name_has_the_same_counts(place: Path, run: Run) -> None:
    whole = load_file(place / "clip-warm" / "model.safetensors")
    encoder = {name: each for name, each in whole.items() if name.startswith(("vision_model.", "visual_"))}
    save_file(encoder, place / "encoder.safetensors")
    ended = run("eval", "a=encoder.safetensors", "b=clip-warm", "--recipe", "r.toml")
    _, first, second = (line.split("\t") for line in ended.out.splitlines())
    assert (first[0], second[0]) == ("a", "b")
    assert first[2:] == second[2:]


def test_a_threshold_that_is_not_met_has_status_5_and_the_result_is_written(place: Path, run: Run) -> None:
    arguments = ["eval", "warm.safetensors", "--recipe", "r.toml", "-o", "r.json"]
    assert run(*arguments, "--min-average", "0").status == 0
    ended = run(*arguments, "--min-average", "1")
    assert ended.status == 5
    assert ended.rest.startswith("error: average accuracy below 1: warm.safetensors: 0.")
    assert (place / "r.json").exists()


def test_a_task_below_its_threshold_is_named(place: Path, run: Run) -> None:
    arguments = ["eval", "warm.safetensors", "--recipe", "r.toml", "-o", "r.json", "--min-average", "0"]
    assert run(*arguments, "--min", "warm=0", "--min", "cold=0").status == 0
    ended = run(*arguments, "--min", "warm=0", "--min", "cold=1")
    assert ended.status == 5
    assert re.fullmatch(r"error: warm\.safetensors: cold: 0\.\d{4}, below 1\n", ended.rest)
    ended = run("eval", "--recipe", "r.toml", "--min", "warm=1", "--min", "cold=1", "--min-average", "1")
    assert ended.status == 5
    lines = ended.rest.splitlines()
    assert lines[0] == "error: accuracies too low:"
    assert [line.split()[1] for line in lines[1:]] == ["warm:"] * 3 + ["cold:"] * 3 + ["accuracy"]
    assert len(ended.out.splitlines()) == 4


def test_a_floor_for_a_task_that_was_not_evaluated_is_not_met(place: Path, run: Run) -> None:
    ended = run("eval", "warm.safetensors", "--individual", "--recipe", "r.toml", "--min", "cold=0")
    assert ended.status == 5
    assert ended.rest == "error: fine-tuned: cold: not evaluated, so not known to be 0\n"


def test_features_of_models_each_on_its_own_task_have_one_file_each(place: Path, run: Run) -> None:
    ended = run("eval", "--individual", "--recipe", "r.toml", "--features", "f")
    assert (ended.status, ended.rest) == (0, "")
    assert sorted(file.name for file in (place / "f").iterdir()) == ["cold.safetensors", "warm.safetensors"]


def test_results_tell_the_settings_the_models_and_the_parts_of_the_clip(place: Path, run: Run) -> None:
    run("merge", "r.toml", "--method", "ties", "--set", "method.density=0.5", "-o", "ties.safetensors")
    assert run("eval", "ties.safetensors", "--recipe", "r.toml", "-o", "ties.json").status == 0
    said = json.loads((place / "ties.json").read_text())
    assert (said["checkpoint"]["method.density"], said["checkpoint"]["method.aggregate"]) == ("0.5", "sum")
    assert (said["models"], said["device"]) == (
        {"warm": "warm.safetensors", "cold": "cold.safetensors"},
        "cpu",
    )
    weights = load_file(place / "base" / "model.safetensors")
    weights["text_projection.weight"] *= -1
    shutil.copytree(place / "base", place / "other")
    save_file(weights, place / "other" / "model.safetensors", {"format": "pt"})
    run("eval", "ties.safetensors", "--recipe", "r.toml", "--clip", "other", "-o", "other.json")
    other = json.loads((place / "other.json").read_text())
    assert {key for key in other["clip"] if other["clip"][key] != said["clip"][key]} == {"path", "text"}
    assert "the results are of different CLIPs" in run("report", "ties.json", "other.json").err


def killed_in_the_middle(place: Path, number: int) -> tuple[int, str]:
    """Status and stderr of an evaluation that gets the signal when its first task is done."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mergecli", "eval", "warm.safetensors", "--recipe", "r.toml", "-o", "out/r.json"],
        cwd=place, env={**os.environ, "MERGECLI_HOME": str(place / "home")}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    results = place / "home" / "cache" / "results"
    while not list(results.glob("*.safetensors")):
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.01)
    process.send_signal(number)
    _, text = process.communicate(timeout=150)
    return process.returncode, without_counts(text)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_evaluation_that_was_stopped_does_only_what_is_left_and_ends_with_the_same_file(
    place: Path, run: Run, number: int
) -> None:
    make_image_task(place / "data" / "cold", test=1000)
    home = {"MERGECLI_HOME": str(place / "home")}
    status, text = killed_in_the_middle(place, number)
    kept = "interrupted: 1 of 2 tasks are kept; the same command goes on\n"
    assert (status, text) == ((130, kept) if number == signal.SIGINT else (-number, ""))
    assert not (place / "out").exists()
    for kind in ("pixels", "heads"):
        assert len(list((place / "home" / "cache" / kind).glob("*.safetensors"))) <= 2
        shutil.rmtree(place / "home" / "cache" / kind)
    assert run("eval", "warm.safetensors", "--recipe", "r.toml", "-o", "out/r.json", **home).status == 0
    for kind in ("pixels", "heads"):  # only those of the other task were needed
        assert len(list((place / "home" / "cache" / kind).iterdir())) == 1
    assert list((place / "home" / "cache" / "results").iterdir()) == []
    ended = run("eval", "warm.safetensors", "--recipe", "r.toml", "-o", "whole.json", "--no-cache")
    assert ended.status == 0
    assert (place / "whole.json").read_bytes() == (place / "out" / "r.json").read_bytes()


def test_options_of_an_evaluation_stand_in_its_result(place: Path, run: Run) -> None:
    ended = run(
        "eval", "warm.safetensors", "--recipe", "r.toml", "-o", "r.json", "--limit", 6, "--precision", "bfloat16",
        "--corruption", "jpeg_compression", "--severity", 3, "--workers", 2, "--cache-size", "1MB", "--fresh",
        "--features", "features", MERGECLI_HOME=place / "home",
    )  # fmt: skip
    assert (ended.status, ended.rest) == (0, "")
    result = json.loads((place / "r.json").read_text())
    score = result["tasks"]["cold"]
    assert (result["dtype"], score["images"], score["limit"]) == ("bfloat16", 6, 6)
    assert (score["corruption"], score["severity"]) == ("jpeg_compression", 3)
    assert sorted(file.name for file in (place / "features").iterdir()) == [
        "cold.safetensors",
        "warm.safetensors",
    ]


def test_a_report_puts_the_results_side_by_side(place: Path, run: Run) -> None:
    run("eval", "--recipe", "r.toml", "-o", "out/")
    ended = run("report", "out/base.json", "out/warm.json", "--format", "md", "--plot", "bars.png")
    assert (ended.status, ended.rest) == (0, "")
    assert ended.out.splitlines()[0] == "| model | method | warm | cold | average |"
    assert ended.out.splitlines()[2].startswith("| base | pretrained |")
    assert (place / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["x.safetensors", "--task", "mnist"], 2, "error: there is no CLIP to evaluate with"),
        (["x.safetensors", "--clip", "base"], 2, "error: there are no tasks to evaluate on"),
        (["x.safetensors", "--recipe", "r.toml", "--task", "wram"], 2, "error: unknown task `wram` (did you mean `warm`?)"),
        (["x.safetensors", "--recipe", "r.toml"], 3, "error: x.safetensors: no such file or folder"),
        (["warm.safetensors", "--recipe", "r.toml", "--task", "mnist"], 3, "error: hf:datasets/ylecun/mnist (task `mnist`): has not been fetched"),
        (["warm.safetensors", "--recipe", "r.toml", "--split", "tset"], 2, "error: "),
        (["warm.safetensors", "--recipe", "r.toml", "--set", "tasks.warm.classes=[\"a\",\"b\"]"], 3, "error: data/warm (task `warm`): split `test`: the data have 3 classes, the task has 2"),
        (["warm.safetensors", "--recipe", "r.toml", "--min-average", "70"], 2, "error: --min-average: expected a fraction"),
        (["warm.safetensors", "--recipe", "r.toml", "--min", "warm"], 2, "error: --min warm: expected `TASK=X`"),
        (["warm.safetensors", "--recipe", "r.toml", "--min", "warm=7"], 2, "error: --min warm=7: expected `TASK=X`"),
        (["warm.safetensors", "--recipe", "r.toml", "--min", "wram=0.5"], 2, "error: unknown task `wram`"),
        (["warm.safetensors", "--recipe", "r.toml", "--min", "mnist=0.5"], 2, "error: --min mnist=0.5: `mnist` is not among the tasks"),
        (["warm.safetensors", "--recipe", "r.toml", "--corruption", "fog"], 2, "error: unknown corruption `fog`"),
        (["warm.safetensors", "--recipe", "r.toml", "--precision", "float8"], 2, "error: precision: expected one of float32, bfloat16, float16, got `float8`"),
        (["warm.safetensors", "--recipe", "r.toml", "--device", "cuda:7"], 2, "error: device `cuda:7`: cannot be used here"),
        (["warm.safetensors", "--recipe", "r.toml", "--min", "warm=0.1", "--min", "warm=0.9"], 2, "error: --min warm=0.9: `warm` has one already, 0.1"),
        (["warm.safetensors", "--recipe", "r.toml", "--corruption", ""], 2, "error: --corruption: is empty"),
        (["warm.safetensors", "--recipe", "r.toml", "--task", ","], 2, "error: --task: is empty"),
        (["--recipe", "r.toml", "--sweep", "method.density=0.1", "--select", ""], 2, "error: --select: is empty"),
        (["warm.safetensors", "--recipe", "r.toml", "--severity", "4"], 2, "error: --severity: there is no corruption"),
        (["--clip", "base", "--task", "mnist"], 2, "error: there is no checkpoint to evaluate"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_said(
    place: Path, run: Run, arguments: list[str], status: int, message: str
) -> None:
    ended = run("eval", *arguments)
    assert (ended.status, ended.out) == (status, ""), ended.rest
    assert ended.rest.startswith(message), ended.rest


def test_finetune_prints_a_path_that_every_other_command_accepts(place: Path, run: Run) -> None:
    ended = run(
        "finetune", "r.toml", "--task", "warm", "--steps", "3", "--batch-size", "4", "-o", "tuned.safetensors"
    )
    assert (ended.status, ended.out, ended.rest) == (0, "tuned.safetensors\n", "")
    assert run("eval", "tuned.safetensors", "--recipe", "r.toml").status == 0
    ended = run(
        "merge",
        "--base",
        "base",
        "tuned.safetensors",
        "warm.safetensors",
        "--method",
        "ties",
        "-o",
        "m.safetensors",
    )
    assert (ended.status, ended.rest) == (0, "")


def test_a_sweep_prints_a_row_a_point_and_names_the_best(tmp_path: Path, run: Run) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "toy.toml"
    ended = run(
        "eval", "--recipe", recipe, "--method", "ties", "--sweep", "method.scaling_factor=0.0,0.3", "--task", "digits",
        "--limit", 30, "--select", "validation", "-o", "swept", "--plot", "curve.png",
    )  # fmt: skip
    lines = ended.out.splitlines()
    assert ended.status == 0
    assert lines[0] == "method.scaling_factor\tdigits\taverage\ton validation"
    assert [line.split("\t")[0] for line in lines[1:]] == ["0", "0.3"]
    assert ended.rest.startswith("note: ties,scaling_factor-")
    assert "is the best on validation; on the tasks' own split it has" in ended.rest
    ended = run("report", "swept/best.json", *sorted((tmp_path / "swept").glob("ties*.json")), "--plot", "again.png", "--plot-kind", "sweep")  # fmt: skip
    assert ended.status == 0, ended.rest
    ended = run("eval", "--recipe", recipe, "--method", "smile", "--set", "method.gate_rank=2", "--sweep", "method.rank=4", "--task", "digits", "--limit", 3)  # fmt: skip
    assert ended.status == 0, ended.rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "c.png"], "--plot: belongs to a sweep"),
        (["toy:digits", "--sweep", "method.density=0.1,0.2"], "does not go with a checkpoint"),
        (["--sweep", "method.density=0.1", "--individual"], "does not go with --individual"),
    ],
)
def test_options_of_a_sweep_are_refused_elsewhere(run: Run, arguments: list[str], message: str) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "toy.toml"
    ended = run("eval", *arguments, "--recipe", recipe)
    assert (ended.status, ended.out) == (2, "")
    assert message in ended.rest
