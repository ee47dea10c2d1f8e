"""The line at the end of a command."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from mergecli.cli import amounts, ending
from tests.conftest import Run, World

COST = r", \d+\.\d s, peak [\d.]+ [MG]B"
MERGE = (
    "merge",
    "--base",
    "base.safetensors",
    "t1.safetensors",
    "t2.safetensors",
    "--method",
    "task_arithmetic",
)


def digest_of(run: Run, path: str) -> str:
    return json.loads(run("info", path, "--json").out)["digest"]


@pytest.mark.parametrize("more", [["m.safetensors"], ["m"], ["m", "--shard-size", "1kB"]])
def test_a_merge_says_where_its_output_is_with_the_digest_that_info_shows(
    world: World, run: Run, more: list[str]
) -> None:
    ended = run(*MERGE, "-o", *more)
    assert re.fullmatch(rf"wrote {more[0]} \({digest_of(run, more[0])}\){COST}", ended.end)
    assert ended.out == f"{more[0]}\n"


def test_the_json_of_a_merge_has_the_digest_of_its_output(world: World, run: Run) -> None:
    ended = run(*MERGE, "-o", "m.safetensors", "--json")
    assert json.loads(ended.out)["digest"] == digest_of(run, "m.safetensors")


def test_several_files_are_counted_and_listed_with_digests_when_that_is_wanted(
    world: World, run: Run
) -> None:
    sweep = ("--sweep", "method.scaling_factor=0.1,0.2", "-o", "swept")
    assert re.fullmatch(rf"wrote 2 files in swept{COST}", run(*MERGE, *sweep).end)
    long = run(*MERGE, *sweep, "--verbose")
    files = [f"swept/task_arithmetic,scaling_factor-{value}.safetensors" for value in ("0.1", "0.2")]
    assert long.err.splitlines() == [f"wrote {file} ({digest_of(run, file)})" for file in files]


def test_other_files_have_their_sha_256_and_what_is_beside_them_is_named(world: World, run: Run) -> None:
    cosines = ("cos-sim", "--base", "base.safetensors", "t1.safetensors", "t2.safetensors", "-o", "c.csv")
    ended = run(*cosines, "--layers", "l.csv")
    digest = hashlib.sha256((world.folder / "c.csv").read_bytes()).hexdigest()
    beginning = rf"compared 2 task vectors, wrote c.csv \(sha256:{digest[:16]}"
    assert re.fullmatch(rf"{beginning}\) and l.csv{COST}", ended.end)
    assert re.match(rf"{beginning}{digest[16:]}\) and l.csv, ", run(*cosines, "--layers", "l.csv", "-v").end)


def test_what_failed_has_no_such_line_and_help_has_none(world: World, run: Run) -> None:
    assert run(*MERGE, "-o", "base.safetensors").end == ""
    assert run("merge", "--help").end == run("--version").end == ""


def test_a_threshold_that_is_not_met_is_told_after_what_was_done(run: Run) -> None:
    ended = run(
        "eval", "toy:base", "--clip", "toy:base", "--task", "digits", "--limit", 5, "-o", "r.json", "--min-average", 1
    )  # fmt: skip
    assert ended.status == 5
    assert ended.end.startswith("evaluated 1 checkpoint on 1 task, wrote r.json (sha256:")
    assert "error: average accuracy below 1: toy:base: " in ended.err


def test_finetune_says_which_step_won(run: Run) -> None:
    ended = run(
        "finetune", "--base", "toy:base", "--task", "digits", "--steps", 2, "--batch-size", 4,
        "--validate-every", 1, "-o", "m.safetensors",
    )  # fmt: skip
    assert re.match(
        r"trained 2 steps, of which step [012] validated best \(\d+\.\d%\) and is written, wrote m\.safetensors \(",
        ended.end,
    ), ended


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (119.94, "119.9 s"), (192, "3 min 12 s"), (7500, "2 h 5 min")]
)
def test_durations_are_read_easily(seconds: float, text: str) -> None:
    assert amounts.duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(999, "1.0 kB"), (1_616_384, "1.6 MB"), (640 * 10**6, "640 MB"), (1_240_000_000, "1.24 GB")],
)
def test_memory_is_read_easily(size: int, text: str) -> None:
    assert amounts.memory(size) == text


def test_the_peak_of_memory_counts_what_has_been_freed_again() -> None:
    before = ending.peak_memory()
    block = bytearray(b"x" * (64 << 20))
    del block
    assert ending.peak_memory() >= before > 10**7


def test_a_file_that_has_gone_has_no_digest(capsys: pytest.CaptureFixture[str]) -> None:
    ending.begin()
    ending.wrote("gone.csv")
    ending.say()
    assert re.fullmatch(rf"wrote gone.csv{COST}\n", capsys.readouterr().err)
