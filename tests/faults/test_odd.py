"""What somebody found who tried to break it: each ends with one clear error, and nothing is harmed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Run, World, without_end

BASE = ["merge", "--base", "base.safetensors"]


def test_a_model_may_not_be_called_like_the_base(world: World, run: Run) -> None:
    ended = run(*BASE, "base=t1.safetensors", "t2.safetensors", "--method", "average", "-o", "m.safetensors")
    assert (ended.status, ended.out) == (2, "")
    assert "`tuned.base`: `base` is the name of the base: give this model another" in ended.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("schema = true", "`schema`: expected 1, got true"),
        (f"seed = {'9' * 5000}", "has a number that is too long, or tables nested too deeply"),
        (
            f"[method]\nname = 'ties'\nscaling_factor = {'9' * 400}",
            "`method.scaling_factor`: expected a number, got 999",
        ),
        ("x = " + "[" * 3000, "has a number that is too long, or tables nested too deeply"),
        ('base = "~nosuchuser/x"\n[tuned]\na = "t1.safetensors"', "~nosuchuser/x: no such file or folder"),
        (f'base = "{"a" * 5000}"\n[tuned]\na = "t1.safetensors"', "no such file or folder"),
    ],
)
def test_odd_recipes_are_refused(world: World, run: Run, content: str, message: str) -> None:
    (world.folder / "r.toml").write_text(content)
    ended = run(
        "merge", "r.toml", *([] if "[method]" in content else ["--method", "average"]), "-o", "m.safetensors"
    )
    assert (ended.status in (2, 3), ended.out) == (True, "")
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_a_recipe_with_a_byte_order_mark_is_read(world: World, run: Run) -> None:
    (world.folder / "r.toml").write_bytes(b'\xef\xbb\xbf[tuned]\na = "t1.safetensors"\n')
    assert run("merge", "r.toml", "--method", "average", "-o", "m.safetensors").status == 0


def test_a_change_is_one_value(world: World, run: Run) -> None:
    ended = run(
        *BASE,
        "t1.safetensors",
        "--method",
        "ties",
        "--set",
        "method.density=0.1\nseed=3",
        "-o",
        "m.safetensors",
    )
    assert (ended.status, ended.err) == (
        2,
        "error: --set: `method.density`: expected one TOML value\n",
    )


def test_a_missing_whole_number_tensor_is_listed(world: World, run: Run) -> None:
    save_file({k: v for k, v in world.tuned["t1"].items() if k != "steps"}, world.files["t1"])
    ended = run(*BASE, "t1.safetensors", "--method", "average", "-o", "m.safetensors")
    assert (ended.status, ended.err.splitlines()[1]) == (3, "  t1: lacks tensor `steps`")


@pytest.mark.parametrize("inputs", ["foo", "[1, 2]", "[" * 100_000])
def test_foreign_metadata_is_no_trouble(world: World, run: Run, inputs: str) -> None:
    floats = {name: value for name, value in world.tuned["t1"].items() if name != "steps"}
    save_file(floats, world.files["t1"], metadata={"inputs": inputs, "kind": "task vector"})
    assert run("info", "t1.safetensors").status == 0
    assert run(*BASE, "t1.safetensors", "--method", "average", "-o", "m.safetensors").status == 0


@pytest.mark.parametrize("config", ["not json", "[]", '{"model_type": "clip", "vision_config": 3}'])
def test_a_bad_configuration_is_named(world: World, run: Run, config: str) -> None:
    (world.folder / "b").mkdir()
    world.base_file.rename(world.folder / "b" / "model.safetensors")
    (world.folder / "b" / "config.json").write_text(config)
    ended = run("merge", "--base", "b", "t1.safetensors", "--method", "task_arithmetic", "-o", "out")
    assert (ended.status, ended.out) == (3, "")
    assert ended.err.startswith("error: b/config.json: ")
    assert not (world.folder / "out").exists()


@pytest.mark.parametrize(
    ("output", "status", "message"),
    [
        ("", 2, "error: output `.`: expected the name of a folder"),
        ("/", 2, "error: output `/`: expected the name of a folder"),
        ("..", 2, "error: output `..`: expected the name of a folder"),
        ("a" * 300 + ".safetensors", 3, "cannot write: file name too long"),
    ],
)
def test_outputs_that_cannot_be_named_are_refused(
    world: World, run: Run, output: str, status: int, message: str
) -> None:
    ended = run(*BASE, "t1.safetensors", "--method", "average", "-o", output)
    assert (ended.status, ended.out) == (status, "")
    assert message in ended.err


@pytest.mark.parametrize("weight_map", ['{"x": 5}', '{"x": ""}', "{}"])
def test_an_index_that_names_no_files_is_refused(tmp_path: Path, run: Run, weight_map: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    ended = run("info", "m")
    assert (ended.status, ended.out) == (3, "")
    assert "Traceback" not in ended.err


def test_a_named_pipe_is_no_checkpoint(tmp_path: Path, run: Run) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert run("info", "pipe").err == (
        "error: pipe: is a pipe, a file was expected\n"
        "hint: tensors are read from many places of a file: copy them to a file, and name that\n"
    )


def test_a_report_never_replaces_a_result_and_writes_all_or_nothing(tmp_path: Path, run: Run) -> None:
    score = {"accuracy": 0.5, "loss": 1.0, "loss_batch_mean": 1.0, "correct": 1, "images": 2, "split": "test",
             "data": {"source": "x"}, "classes": "c", "templates": "t"}  # fmt: skip
    result = {
        "schema": "mergecli.eval/1", "checkpoint": {"name": "m", "path": "m", "method": None}, "clip": {"path": "b"},
        "model_info": {"all_params": 1}, "batch_size": 1, "dtype": "float32", "tasks": {"mnist": score},
    }  # fmt: skip
    file = tmp_path / "r.json"
    file.write_text(json.dumps(result))
    assert run("report", "r.json").status == 0
    ended = run("report", "r.json", "-o", "r.json")
    assert (ended.status, ended.out) == (2, "")
    assert json.loads(file.read_text()) == result
    assert run("report", "r.json", "-o", "t.md", "--plot", "x.txt").status == 2
    assert run("report", "r.json", "-o", "t.pdf").status == 2
    assert [each.name for each in tmp_path.iterdir()] == ["r.json"]
    for broken in ({"loss": 10**400}, {"loss": "x"}, {"accuracy": 0.7}):
        file.write_text(json.dumps({**result, "tasks": {"mnist": score | broken}}))
        assert run("report", "r.json").status == 3
    for part in ("checkpoint", "clip", "model_info", "tasks"):
        file.write_text(json.dumps({**result, part: []}))
        ended = run("report", "r.json")
        assert (ended.status, ended.err.splitlines()[0]) == (
            3,
            f"error: r.json: is not a result: `{part}`: expected a table, got []",
        )


def test_cosines_and_their_layers_need_two_files(world: World, run: Run) -> None:
    ended = run("cos-sim", "--base", "base.safetensors", "t1.safetensors", "-o", "c.csv", "--layers", "c.csv")
    assert (ended.status, ended.err) == (2, "error: c.csv: two outputs have this name\n")


def closed(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = f"{sys.executable} -m mergecli {command}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=folder)


def test_closed_and_full_streams_lose_no_work(world: World) -> None:
    merge = "merge t1.safetensors t2.safetensors --method average -o"
    for number, streams in enumerate((">&-", "<&- >&- 2>&-")):
        done = closed(f"{merge} {number}.safetensors {streams}", world.folder)
        assert (done.returncode, without_end(done.stderr)) == (0, ""), streams
    contents = {(world.folder / f"{number}.safetensors").read_bytes() for number in range(2)}
    assert len(contents) == 1
    assert closed("methods 2>&-", world.folder).returncode == 0
    assert closed("info nosuch.safetensors 2>&-", world.folder).returncode == 3
    done = closed("methods > /dev/full", world.folder)
    assert (done.returncode, done.stderr) == (3, "error: stdout: cannot write: no space left on device\n")
    noted = "merge --onto base.safetensors t1.safetensors --method average -o noted.safetensors"
    done = closed(f"{noted} 2> /dev/full", world.folder)
    assert (done.returncode, done.stdout) == (0, "noted.safetensors\n")
    assert (world.folder / "noted.safetensors").exists()


def test_a_working_folder_that_was_removed_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergecli import cli

    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.run(["methods"]) == 3
    told = "error: the working folder was removed, or cannot be entered\nhint: `cd` to another\n"
    assert capsys.readouterr() == ("", told)


def test_a_file_whose_name_is_no_name_of_a_model_gets_another(world: World, run: Run) -> None:
    world.files["t1"].rename(world.folder / "t (1).safetensors")
    line = ["merge", "t2.safetensors", "--method", "average", "-o", "m.safetensors"]
    ended = run(*line, "t (1).safetensors")
    assert (ended.status, ended.err) == (2, (
        "error: command line: `tuned.t (1)`: bad name: expected letters, digits, `-`, `_`, `.` or `+`, beginning with a "
        "letter or digit\nhint: write `NAME=SOURCE`\n"
    ))  # fmt: skip
    assert run(*line, "t1=t (1).safetensors").status == 0


def test_an_argument_that_is_empty_is_no_source(run: Run) -> None:
    ended = run("merge", "", "t2.safetensors", "--method", "average", "-o", "m.safetensors")
    assert (ended.status, ended.err.splitlines()[0]) == (2, "error: a source is empty")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into the process")
@pytest.mark.parametrize(
    "seconds", [0.0, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.1, 0.2, 0.4, 0.6, 0.8)), 2.0]
)
def test_ctrl_c_is_130_while_libraries_are_imported_too(world: World, seconds: float) -> None:
    save_file({"w": torch.zeros(1500, 1500)}, world.folder / "zero.safetensors")
    save_file({"w": torch.randn(1500, 1500)}, world.folder / "large.safetensors")
    process = subprocess.Popen(
        [sys.executable, "-m", "mergecli", "merge", "large.safetensors", "x=large.safetensors", "--method", "wudi",
         "--base", "zero.safetensors", "-o", "m.safetensors"],
        cwd=world.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None, "it ended before torch was imported"
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted: nothing new is kept; the same command starts again\n"
    assert not (world.folder / "m.safetensors").exists()
