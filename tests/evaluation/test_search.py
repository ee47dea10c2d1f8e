"""Searches that are evaluated: the best trial is reported on images that the search never saw, and what was done is kept."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import mergecli
from mergecli.evaluation import sweep as sweeps
from mergecli.results.statistics import Count
from mergecli.runtime.errors import UsageError
from tests.conftest import Run

pytest.importorskip("optuna", reason="the extra `search` is not installed")

SPACE = ["method.scaling_factor=0.0:0.6", "method.density=0.1:1.0:log"]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a temporary folder of the test's own."""
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def test_the_best_trial_is_chosen_on_one_split_and_reported_on_another(
    recipe_file: Path, tmp_path: Path, own_folders: Path
) -> None:
    found = mergecli.search(recipe_file, SPACE, output=tmp_path / "found", trials=6, sampler="sobol")
    assert list(own_folders.glob("mergecli*")) == []
    assert [each.slot for each in found.trials] == list(range(6))
    best = max(found.trials, key=lambda each: each.objective or 0)
    assert best.slot == found.best
    own = [each.correct / each.images for each in best.counts.values()]
    assert best.objective == pytest.approx(sum(own) / 2)
    assert {each.split for each in found.confirmed.tasks.values()} == {"test"}
    settings = {key.removeprefix("method."): value for key, value in best.values.items()}
    merged = mergecli.merge(
        recipe_file, method="ties", settings=settings, output=tmp_path / "again.safetensors"
    )
    (again,) = mergecli.evaluate([merged.path], recipe=recipe_file)
    assert again.average == found.confirmed.average
    assert found.command == (
        f"mergecli merge {recipe_file} --set method.scaling_factor={settings['scaling_factor']} "
        f"--set method.density={settings['density']} -o best.safetensors"
    )
    written = json.loads((tmp_path / "found" / "best.json").read_text())
    assert (written["checkpoint"]["digest"], written["checkpoint"]["selected_on"]) == (
        again.checkpoint["digest"],
        "validation",
    )
    assert (tmp_path / "found" / "trials.csv").read_text() == found.table.text("csv")
    assert (tmp_path / "found" / "parallel.png").read_bytes().startswith(b"\x89PNG")
    assert found.table.rows[found.best][-1] == "best"
    assert "on the tasks' own split, which the search never saw, it has" in found.note
    more = mergecli.search(recipe_file, SPACE, output=tmp_path / "found", trials=7, sampler="sobol")
    assert more.trials[:6] == found.trials, "a search goes on where it was"


@pytest.mark.slow
def test_an_interrupted_search_goes_on_and_finds_what_it_would_have_found(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mergecli.search(recipe_file, SPACE, output=tmp_path / "whole", trials=18, seed=3)
    merged: list[int] = []
    merge_batch = sweeps.merge_batch

    def counted(points: Any, *rest: Any, **more: Any) -> Any:
        merged.append(len(points))
        if len(merged) == 2:
            raise KeyboardInterrupt
        return merge_batch(points, *rest, **more)

    monkeypatch.setattr(sweeps, "merge_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        mergecli.search(recipe_file, SPACE, output=tmp_path / "found", trials=18, seed=3)
    found = mergecli.search(recipe_file, SPACE, output=tmp_path / "found", trials=18, seed=3)
    assert found.trials == whole.trials
    assert found.confirmed == whole.confirmed
    assert merged == [10, 4, 4, 4, 1], (
        "a batch shares a pass; the interrupted one is merged again, and last the best"
    )


def test_trials_in_the_worse_half_are_pruned_after_a_part_of_the_images(
    recipe_file: Path, tmp_path: Path
) -> None:
    found = mergecli.search(
        recipe_file, [*SPACE, "method.name=ties,average"], output=tmp_path / "found", trials=8, sampler="sobol", prune=True, limit=8,
        split="train", objective="worst",
    )  # fmt: skip
    images = {each.outcome: {count.images for count in each.counts.values()} for each in found.trials}
    assert images["complete"] == {8}
    assert images["pruned"] <= {2, 4}
    assert found.trials[found.best].outcome == "complete"
    assert {score.images for score in found.confirmed.tasks.values()} != {8}, "the report is on all images"


@pytest.mark.slow
def test_without_a_limit_trials_are_pruned_after_a_part_of_the_tasks(
    recipe_file: Path, tmp_path: Path
) -> None:
    tasks = mergecli.search(
        recipe_file, SPACE, output=tmp_path / "tasks", trials=4, sampler="random", prune=True, split="train", objective="more",
    )  # fmt: skip
    assert {tuple(each.counts) for each in tasks.trials if each.outcome == "pruned"} == {("more",)}
    assert all(
        each.objective == each.counts["more"].correct / each.counts["more"].images for each in tasks.trials
    )
    assert all(isinstance(count, Count) for each in tasks.trials for count in each.counts.values())


def test_the_command_prints_the_trials_and_nothing_that_optuna_logs(
    recipe_file: Path, tmp_path: Path, run: Run
) -> None:
    done = run(
        "search", recipe_file, "--space", "method.scaling_factor=0.1:0.5", "--trials", 2, "--sampler", "random", "-o", "found",
        "--set", "method.layers=[{ match = 'norm', keep = 'base' }]", "--space", "method.layers[0].keep=base,tints",
    )  # fmt: skip
    assert done.status == 0
    lines = done.out.splitlines()
    assert lines[0] == (
        "trial\tmethod.scaling_factor\tmethod.layers[0].keep\ttints\tmore\taverage\ton validation"
    )
    assert len(lines) == 3
    assert "[I " not in done.err
    assert "RDB" not in done.err
    assert "note: merge it: mergecli merge " in done.err
    for arguments, message in (
        (
            ["--split", "test"],
            "--split test: the best is reported on this split of `tints`, `more`, which the search must not see",
        ),
        (
            ["--objective", "mor"],
            "--objective: expected average, worst, tints or more, got `mor` (did you mean `more`?)",
        ),
        (["--part", "1/2"], "--part: the trials of a search are not known before"),
        (
            ["--space", "method.density=0.1:2"],
            "--space: `method.density`: expected a number in (0, 1], got 2.0",
        ),
    ):
        ended = run(
            "search", recipe_file, "--space", "method.scaling_factor=0.1:0.5", "-o", "none", *arguments
        )
        assert ended.status == 2
        assert f"error: {message}" in ended.err.splitlines()
        assert not (tmp_path / "none" / "study.db").exists()
    planned = run(
        "search", recipe_file, "--space", "method.scaling_factor=0.1:0.5", "-o", "planned", "--dry-run"
    )
    assert planned.status == 0
    assert "40 merges on tints" in planned.out
    assert not (tmp_path / "planned").exists()


def test_the_output_is_a_folder(recipe_file: Path) -> None:
    with pytest.raises(UsageError) as error:
        mergecli.search(recipe_file, ["method.density=0.1:0.5"], output="found.json")
    assert error.value.message == "found.json: a search has several results, so the output is a folder"


@pytest.mark.slow
def test_an_engine_finds_what_one_process_finds(recipe_file: Path, tmp_path: Path) -> None:
    one = mergecli.search(recipe_file, SPACE, output=tmp_path / "one", trials=12)
    other = mergecli.search(
        recipe_file, SPACE, output=tmp_path / "other", trials=12, engine=mergecli.Engine(jobs=2)
    )
    assert other.trials == one.trials
    assert other.confirmed == one.confirmed


def _command(recipe_file: Path, output: str) -> list[str]:
    spaces = [word for each in SPACE for word in ("--space", each)]
    return [
        sys.executable,
        "-m",
        "mergecli",
        "search",
        str(recipe_file),
        *spaces,
        "--trials",
        "40",
        "-o",
        output,
    ]


@pytest.mark.slow
def test_a_search_that_is_killed_at_twenty_moments_ends_as_one_that_was_not(
    recipe_file: Path, tmp_path: Path
) -> None:
    subprocess.run(_command(recipe_file, "whole"), cwd=tmp_path, check=True, capture_output=True)
    moment, log = random.Random(19), tmp_path / "killed" / "units.jsonl"
    for _ in range(20):
        before = log.read_text().count("\n") if log.exists() else 0
        process = subprocess.Popen(
            _command(recipe_file, "killed"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )  # fmt: skip
        while process.poll() is None and (log.read_text().count("\n") if log.exists() else 0) == before:
            time.sleep(0.02)  # something new is done, so that the twenty are not all at its start
        time.sleep(moment.uniform(0.0, 0.5))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(
        _command(recipe_file, "killed"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("trials.csv", "best.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_do_one_study_and_give_the_same_report(recipe_file: Path, tmp_path: Path) -> None:
    several = [
        subprocess.Popen(_command(recipe_file, "shared"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    ended = [(*each.communicate(), each.returncode) for each in several]
    assert [status for _, _, status in ended] == [0, 0], [err for _, err, _ in ended]
    assert ended[0][0] == ended[1][0]
    assert [line.split("\t")[0] for line in ended[0][0].splitlines()[1:]] == [str(slot) for slot in range(40)]
