"""Evaluations cut into units: parts, several processes, damaged models, killed callers. The results are those of one process."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import mergecli
from mergecli.evaluation import counting
from mergecli.evaluation.grid import interleaved
from mergecli.runtime.engines.contract import Engine, Unit
from mergecli.runtime.errors import InputError, UsageError

TOWERS = ("base", "tower.safetensors", "vector.safetensors")


@pytest.fixture
def whole(place, recipe, tmp_path) -> dict[str, bytes]:
    """The results of one process."""
    mergecli.evaluate([place / name for name in TOWERS], recipe=recipe, output=tmp_path / "whole")
    return results(tmp_path / "whole")


def results(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.json")}


def log(folder: Path) -> list[str]:
    """The units that were done, in the order of their names."""
    return sorted(json.loads(line)["unit"] for line in (folder / "units.jsonl").read_text().splitlines())


EVERY = sorted(f"{tower} on {task}" for tower in ("base", "tower", "vector") for task in ("tints", "more"))


def test_parts_in_any_order_are_disjoint_and_complete_and_put_together_as_one_process_would(
    place, recipe, tmp_path, whole
):
    given = {"checkpoints": [place / name for name in TOWERS], "recipe": recipe}
    for order in permutations((1, 2, 3)):
        folder = tmp_path / "-".join(map(str, order))
        for number in order:
            assert mergecli.evaluate(**given, output=folder, engine=Engine(part=f"{number}/3")) == ()
        assert log(folder) == EVERY
        assert results(folder) == {}
        mergecli.evaluate(**given, output=folder, engine=Engine(collect=True))
        assert results(folder) == whole


def test_what_is_missing_is_named(place, recipe, tmp_path):
    given = {"checkpoints": [place / name for name in TOWERS], "recipe": recipe, "output": tmp_path / "out"}
    mergecli.evaluate(**given, engine=Engine(part="1/2"))
    mergecli.evaluate(**given, engine=Engine(part="1/2"))
    assert len(log(tmp_path / "out")) == 3
    with pytest.raises(InputError) as caught:
        mergecli.evaluate(**given, engine=Engine(collect=True))
    assert caught.value.message == (
        "3 of 6 units are missing:\n  tower on more\n  vector on tints\n  vector on more"
    )


@pytest.mark.parametrize("engine", [Engine(part="1/2"), Engine(collect=True)])
def test_parts_meet_in_a_folder(place, recipe, engine):
    with pytest.raises(UsageError, match="the parts meet in a folder"):
        mergecli.evaluate(place / "base", recipe=recipe, output="r.json", engine=engine)


def test_several_processes_write_the_same_and_a_second_run_does_nothing(
    place, recipe, tmp_path, whole, monkeypatch
):
    given = {"checkpoints": [place / name for name in TOWERS], "recipe": recipe, "output": tmp_path / "out"}
    mergecli.evaluate(**given, predictions=tmp_path / "p.parquet", engine=Engine(jobs=2))
    assert (results(tmp_path / "out"), log(tmp_path / "out")) == (whole, EVERY)
    mergecli.evaluate(**given | {"output": tmp_path / "whole"}, predictions=tmp_path / "w.parquet")
    assert (tmp_path / "p.parquet").read_bytes() == (tmp_path / "w.parquet").read_bytes()
    monkeypatch.setattr(counting, "count", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    mergecli.evaluate(**given, engine=Engine(jobs=2))
    assert log(tmp_path / "out") == EVERY


def test_a_damaged_model_ends_an_evaluation_unless_the_others_are_to_go_on(place, recipe, tmp_path, whole):
    cut = (place / "tower.safetensors").read_bytes()[:-100]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    weights = load_file(place / "tower.safetensors")
    weights["vision_model.post_layernorm.bias"][0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    broken = [tmp_path / "cut.safetensors", tmp_path / "nan.safetensors"]
    given = {"recipe": recipe, "output": tmp_path / "out"}
    with pytest.raises(InputError, match=r"cut\.safetensors"):
        mergecli.evaluate([*broken, *(place / name for name in TOWERS)], **given, engine=Engine(jobs=2))
    with pytest.raises(mergecli.FailedUnitsError) as caught:
        mergecli.evaluate(
            [*broken, *(place / name for name in TOWERS)], **given, engine=Engine(keep_going=True)
        )
    assert "4 of 10 units failed:\n  cut on tints (and 1 more): " in caught.value.message
    assert (
        f"nan on tints: {tmp_path}/nan.safetensors: gives NaN or infinite logits on task `tints`"
        in caught.value.message
    )
    assert int(caught.value.status) == 3
    assert [result.name for result in caught.value.results] == ["base", "tower", "vector"]
    assert (results(tmp_path / "out"), log(tmp_path / "out")) == (whole, EVERY)


def test_a_task_whose_prompts_are_too_long_fails_and_the_others_go_on(place, recipe, tmp_path):
    wrong = replace(recipe.tasks["more"], templates=("so " * 90 + "{}",))
    recipe = replace(recipe, tasks={**recipe.tasks, "more": wrong})
    with pytest.raises(mergecli.FailedUnitsError) as caught:
        mergecli.evaluate(place / "base", recipe=recipe, output=tmp_path, engine=Engine(keep_going=True))
    said = (
        r"1 of 2 units failed:\n  base on more: class `.*`: a prompt has \d+ tokens, the text tower takes 77"
    )
    assert re.match(said, caught.value.message)
    assert log(tmp_path) == ["base on tints"]


SWEEP = {"over": ["method.scaling_factor=0.1,0.2,0.3"], "method": "ties", "select": "validation"}


def test_a_sweep_in_parts_is_that_of_one_process(recipe_file, tmp_path):
    given = SWEEP
    swept = mergecli.sweep(recipe_file, **given, output=tmp_path / "whole")
    for number in (2, 1):
        part = mergecli.sweep(
            recipe_file, **given, output=tmp_path / "parts", engine=Engine(part=f"{number}/2")
        )
        assert part.results == ()
    assert (
        mergecli.sweep(recipe_file, **given, output=tmp_path / "parts", engine=Engine(collect=True)) == swept
    )
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


@pytest.mark.slow
def test_a_sweep_by_several_processes_is_that_of_one(recipe_file, tmp_path):
    swept = mergecli.sweep(recipe_file, **SWEEP, output=tmp_path / "whole")
    assert mergecli.sweep(recipe_file, **SWEEP, output=tmp_path / "two", engine=Engine(jobs=2)) == swept
    assert results(tmp_path / "two") == results(tmp_path / "whole")
    assert len(log(tmp_path / "two")) == 3 * 2 + 2


def test_workers_that_begin_together_have_different_towers_and_tasks():
    units = [Unit((f"t{tower}", f"d{task}"), "") for tower in range(5) for task in range(3)]
    order = interleaved(units, window=3)
    assert sorted(unit.of for unit in order) == sorted(unit.of for unit in units)
    for start in range(0, 9, 3):
        assert len({unit.of[0] for unit in order[start : start + 3]}) == 3
        assert len({unit.of[1] for unit in order[start : start + 3]}) == 3
    assert {unit.of[0] for unit in order[:9]} == {"t0", "t1", "t2"}


@pytest.mark.slow
def test_a_caller_that_is_killed_at_any_moment_loses_no_finished_unit(place, recipe_file, tmp_path):
    towers = [str(place / name) for name in TOWERS]
    command = [
        sys.executable,
        "-m",
        "mergecli",
        "eval",
        *towers,
        "--recipe",
        str(recipe_file),
        "--batch-size",
        "1",
    ]
    assert subprocess.run([*command, "-o", "whole"]).returncode == 0
    rng, out, seen = random.Random(0), Path("out"), 0

    def done() -> int:
        return len(list(out.glob(".units/*.safetensors")))

    for moment in range(30):
        options = ["-o", "out", "--jobs", "2"] if moment % 2 else ["-o", "out"]
        wanted = done() + rng.randrange(3)
        with subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and done() < wanted:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
        if done() == len(EVERY) or moment == 29:  # then the same command to its end, and from the start
            before = log(out) if (out / "units.jsonl").exists() else []
            assert subprocess.run([*command, *options]).returncode == 0
            after = log(out)
            assert [after.count(unit) for unit in before] == [1] * len(before)
            assert len(list(out.glob(".units/*.safetensors"))) == len(EVERY)
            assert results(out) == results(Path("whole"))
            seen += len(before)
            shutil.rmtree(out)
    assert seen > 0


@pytest.mark.slow
def test_two_callers_in_one_folder_write_the_same(place, recipe_file, tmp_path):
    towers = [str(place / name) for name in TOWERS]
    command = [sys.executable, "-m", "mergecli", "eval", *towers, "--recipe", str(recipe_file)]
    assert subprocess.run([*command, "-o", "whole"]).returncode == 0
    both = [subprocess.Popen([*command, "-o", "out", "--jobs", "2"]) for _ in range(2)]
    assert [each.wait() for each in both] == [0, 0]
    assert results(Path("out")) == results(Path("whole"))
    assert sorted(set(log(Path("out")))) == EVERY


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_leaves_whole_results(place, recipe_file, tmp_path):
    command = [
        sys.executable,
        "-m",
        "mergecli",
        "eval",
        str(place / "base"),
        str(place / "tower.safetensors"),
    ]
    with subprocess.Popen(
        [*command, "--recipe", str(recipe_file), "-o", "out", "--jobs", "2", "--batch-size", "1"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "MERGECLI_HOME": str(tmp_path / "home")},
    ) as process:  # fmt: skip
        while not list(Path("out/.units").glob("*.safetensors")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate()
    assert process.returncode in (0, 130)
    assert "Traceback" not in text
    names = [file.name for file in Path("out/.units").iterdir()]
    assert all(name.endswith(".safetensors") for name in names)
