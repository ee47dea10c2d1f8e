"""Chains of merges, evaluated after every step: what is written, what is kept, and that nothing depends on interruptions."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mergecli
from mergecli.evaluation import continual as chains
from mergecli.results.result import read_result
from mergecli.runtime.engines.contract import Engine
from mergecli.runtime.errors import InputError, UsageError
from tests.conftest import Run


def files(folder: Path) -> dict[str, bytes]:
    """Everything that was written but the units and their log."""
    every = sorted(each for each in folder.rglob("*") if each.is_file())
    return {
        str(each.relative_to(folder)): each.read_bytes()
        for each in every
        if ".units" not in each.parts and each.name != "units.jsonl"
    }


def test_every_step_is_evaluated_on_the_tasks_seen_so_far_and_the_last_merge_stays(
    recipe_file: Path, tmp_path: Path
) -> None:
    changes = ["method=average", 'continual.order=["more", "tints"]', "eval.batch_size=8"]
    done = mergecli.continual(recipe_file, output=tmp_path / "out", changes=changes)
    assert done.orders == (("more", "tints"),)
    assert sorted(files(tmp_path / "out")) == [
        "order-01/step-01.json", "order-01/step-02.json", "order-01/step-02.safetensors",
        "order-01/step-02.state.safetensors",
    ]  # fmt: skip
    first, second = (read_result(tmp_path / f"out/order-01/step-0{step}.json") for step in (1, 2))
    assert list(first.tasks) == ["more"]
    assert list(second.tasks) == ["more", "tints"]
    assert [second.checkpoint[key] for key in ("name", "chain", "order", "step", "method")] == [
        "order-01-step-02", "order-01", "more,tints", "2", "average",
    ]  # fmt: skip
    (alone,) = mergecli.evaluate(done.models, recipe=recipe_file, tasks=["more", "tints"], batch_size=8)
    assert alone.tasks == second.tasks
    assert done.table.rows[0][:2] == ("average", "average accuracy, step 1")


def test_orders_are_drawn_as_python_shuffles_them_with_one_seed_after_the_other(
    recipe_file: Path, tmp_path: Path
) -> None:
    changes = ["method=opcm", "continual.orders=3", "continual.seed=42"]
    done = mergecli.continual(recipe_file, output=tmp_path / "out", changes=changes, limit=4)
    want: list[tuple[str, ...]] = []
    for seed in (42, 43, 44):
        names = ["tints", "more"]
        random.Random(seed).shuffle(names)
        want.append(tuple(names))
    assert done.orders == tuple(want)
    assert [each.name for each in done.results] == [
        f"order-0{n}-step-0{k}" for n in (1, 2, 3) for k in (1, 2)
    ]


def test_a_second_run_merges_and_counts_nothing_and_a_lost_step_is_made_again(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"method": "dop", "changes": ["method.steps=2"], "limit": 4, "output": tmp_path / "out"}
    mergecli.continual(recipe_file, keep=True, **given)
    before = files(tmp_path / "out")
    assert "order-01/step-01.state.safetensors" in before
    made: list[int] = []
    step = chains._Job._step

    def counted(job: chains._Job, number: int) -> None:
        made.append(number)
        step(job, number)

    monkeypatch.setattr(chains._Job, "_step", counted)
    mergecli.continual(recipe_file, keep=True, **given)
    assert made == []
    (tmp_path / "out/order-01/step-02.safetensors").unlink()
    mergecli.continual(recipe_file, keep=True, **given)
    assert made == [2]
    damaged = tmp_path / "out/order-01/step-01.safetensors"
    damaged.write_bytes(b"x")
    (tmp_path / "out/order-01/step-02.state.safetensors").unlink()
    mergecli.continual(recipe_file, keep=True, **given)
    assert made == [2, 1, 2]
    del before["order-01/step-01.safetensors"]
    now = files(tmp_path / "out")
    assert {name: now[name] for name in before} == before


def test_processes_and_parts_write_the_same_bytes(recipe_file: Path, tmp_path: Path) -> None:
    given = {"method": "task_arithmetic", "limit": 4}
    mergecli.continual(recipe_file, output=tmp_path / "one", **given)
    for part in ("2/2", "1/2"):
        assert (
            mergecli.continual(
                recipe_file, output=tmp_path / "parts", engine=Engine(part=part), **given
            ).results
            == ()
        )
    mergecli.continual(recipe_file, output=tmp_path / "parts", engine=Engine(collect=True), **given)
    assert files(tmp_path / "parts") == files(tmp_path / "one")


@pytest.mark.slow
def test_an_engine_writes_the_same_bytes(recipe_file: Path, tmp_path: Path) -> None:
    given = {"method": "task_arithmetic", "limit": 4}
    mergecli.continual(recipe_file, output=tmp_path / "one", **given)
    mergecli.continual(recipe_file, output=tmp_path / "two", engine=Engine(jobs=2), **given)
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_what_is_wrong_is_said_before_any_work(recipe_file: Path, tmp_path: Path) -> None:
    cases: list[tuple[list[str], str]] = [
        (["method=tsv_m"], "`tsv_m` needs all models at once, and cannot go on from an earlier merge"),
        (['continual.order=["tints", "mor"]'], "`mor` is no model of `[tuned]` (did you mean `more`?)"),
        (['continual.order=["tints"]'], "lacks `more`: expected every model once"),
        (['continual.order=["tints", "tints", "more"]'], "`tints` stands there twice"),
        (['continual={order=["tints", "more"], orders=2}'], "there is `order` too: give one of the two"),
        (["continual.seed=1"], "is for orders that are drawn: say how many with `orders`"),
        (["continual.orders=0"], "expected a whole number, at least 1, got 0"),
        (["continual.ordres=2"], "unknown key (did you mean `orders`?)"),
    ]
    for changes, message in cases:
        with pytest.raises(UsageError) as caught:
            mergecli.continual(recipe_file, output=tmp_path / "out", changes=changes)
        assert message in caught.value.message
    with pytest.raises(UsageError, match="a chain has several results, so the output is a folder"):
        mergecli.continual(recipe_file, output=tmp_path / "out.json", method="average")
    with pytest.raises(InputError, match="units are missing"):
        mergecli.continual(
            recipe_file, output=tmp_path / "out", method="average", engine=Engine(collect=True)
        )
    assert files(tmp_path) == {}


def test_the_command_prints_the_table_of_the_report(recipe_file: Path, tmp_path: Path, run: Run) -> None:
    ended = run("continual", recipe_file, "--method", "average", "--limit", "4", "-o", "out")
    assert ended.status == 0
    assert ended.out.startswith("method\tmeasure\tmean\tstd\naverage\taverage accuracy, step 1\t")
    assert "merged and evaluated 2 steps in 1 order, wrote " in ended.end
    reported = run("report", "--continual", "out", "--steps", "steps.csv")
    assert reported.out == ended.out
    lines = (tmp_path / "steps.csv").read_text().splitlines()
    assert lines[0] == "model_name,tints,more"
    assert lines[1].startswith("average_order-01_step_1,")
    assert lines[1].endswith(",")
    planned = run("continual", recipe_file, "--method", "average", "-o", "new", "--dry-run")
    assert planned.status == 0
    assert not (tmp_path / "new").exists()


CHAIN = """
import sys
import mergecli
from mergecli.evaluation import continual, evaluate, sweep
import torch, transformers
torch.set_num_threads(1)
print("ready", flush=True)
mergecli.continual(sys.argv[1], output=sys.argv[2], changes=["continual.orders=2"], limit=6, workers=1)
"""
RECIPE = """
base = "toy:base"
method = "opcm"
dtype = "float16"

[tuned]
digits = "toy:digits"
letters = "toy:letters"
shapes = "toy:shapes"
faces = "toy:faces"
"""


@pytest.mark.slow
def test_chains_that_are_killed_anywhere_have_the_same_bytes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)

    def begun(output: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHAIN, str(recipe), str(output)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout as printed:
            assert printed.readline() == "ready\n"
        return process

    start = time.monotonic()
    assert begun(tmp_path / "whole").wait() == 0
    whole, took = files(tmp_path / "whole"), time.monotonic() - start
    rng, kills, finished = random.Random(0), 0, 0
    limit = first = 0.1 * took  # longer after every kill, so that some run ends however busy the machine is
    seen: set[int] = set()
    while kills < 24 or not finished:
        output = tmp_path / f"killed-{finished}"
        process = begun(output)
        try:
            process.wait(rng.uniform(0, limit))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills, limit = kills + 1, 1.15 * limit
            seen.add(len(files(output)))
            continue
        assert process.returncode == 0
        finished, limit = finished + 1, first
        assert {name: data for name, data in files(output).items() if not name.endswith(".part")} == whole
    assert len(seen) > 3
