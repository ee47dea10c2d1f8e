"""One language of options, and the old words that are still understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.main import get_command

from mergecli.cli import spellings
from mergecli.cli.app import app
from tests.conftest import Run, World

RECIPE = 'base = "base.safetensors"\n[tuned]\nt1 = "t1.safetensors"\nt2 = "t2.safetensors"\n'
TOYS = 'base = "toy:base"\n[tuned]\ndigits = "toy:digits"\nletters = "toy:letters"\n'
PROGRAM: Any = get_command(app())


def rewritten(command: str, *arguments: str) -> list[str]:
    return spellings.rewritten(command, PROGRAM.commands[command].params, arguments, say=False)


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        ("eval", ["r.toml"], ["--recipe", "r.toml"]),
        ("eval", ["a.safetensors", "r.toml", "-o", "x.toml"], ["--recipe", "r.toml", "a.safetensors", "-o", "x.toml"]),
        ("eval", ["--recipe=r.toml", "--tasks=a,b"], ["--recipe", "r.toml", "--task=a,b"]),
        ("eval", ["--only", "base", "--dtype", "bfloat16"], ["--model", "base", "--precision", "bfloat16"]),
        ("eval", ["--", "r.toml"], ["--", "r.toml"]),
        ("eval", ["a", "--json"], ["a", "--format=json"]),
        ("merge", ["--recipe", "r.toml", "-o", "m"], ["r.toml", "-o", "m"]),
        ("merge", ["r.toml", "-o", "m", "--format", "json"], ["r.toml", "-o", "m", "--json"]),
        ("merge", ["r.toml", "--format", "csv"], ["r.toml", "--format", "csv"]),
        ("measure", ["-o", "s", "--only", "a", "--recipe", "r.toml"], ["r.toml", "-o", "s", "--task", "a"]),
        ("fetch", ["toy:base", "--recipe", "r.toml"], ["r.toml", "toy:base"]),
        ("fetch", ["r.toml", "--only", "data"], ["r.toml", "--only", "data"]),
        ("tasks", ["birds", "r.toml"], ["--recipe", "r.toml", "birds"]),
        ("info", ["m.safetensors", "--recipe"], ["m.safetensors", "--recipe"]),
        ("merge", ["--recipe"], ["--recipe"]),
    ],
)  # fmt: skip
def test_other_spellings_mean_the_same(command: str, given: list[str], expected: list[str]) -> None:
    assert rewritten(command, *given) == expected


def test_two_recipes_are_one_too_many(run: Run) -> None:
    ended = run("eval", "a.toml", "--recipe", "b.toml")
    assert (ended.status, ended.err) == (2, "error: --recipe: expected one recipe, got `b.toml` and `a.toml`\n".replace(
        "`b.toml` and `a.toml`", "`a.toml` and `b.toml`"
    ))  # fmt: skip


def test_an_old_option_works_with_a_note(run: Run) -> None:
    command = ("eval", "toy:base", "--clip", "toy:base", "--limit", 3)
    old, new = (
        run(*command, "--tasks", "digits,letters"),
        run(*command, "--task", "digits", "--task", "letters"),
    )
    assert old.out == new.out
    assert (
        old.rest == "note: `--tasks` is called `--task` now, and will not be understood by a later version\n"
    )
    assert new.rest == ""


def test_every_old_option_has_a_new_one_that_exists() -> None:
    for command, words in spellings.OLD.items():
        known = {name for each in PROGRAM.commands[command].params for name in each.opts}
        assert set(words.values()) <= known
        assert known.isdisjoint(words)


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "--method", "average", "-o", "out.safetensors"],
        ["taskvector", "-o", "out"],
        ["cos-sim"],
        ["fetch"],
    ],
)
def test_a_recipe_is_an_argument_or_an_option(world: World, run: Run, command: list[str]) -> None:
    Path("r.toml").write_text(RECIPE)
    first, second = run(*command, "r.toml"), run(*command, "--recipe", "r.toml")
    assert (first.status, first.out) == (second.status, second.out) == (0, first.out)
    assert first.out


def test_eval_and_finetune_and_measure_take_it_both_ways(run: Run) -> None:
    Path("r.toml").write_text(TOYS)
    assert run("eval", "r.toml", "--model", "base", "--limit", 2).out == (
        run("eval", "--recipe", "r.toml", "--model", "base", "--limit", 2).out
    )
    few = ("--task", "digits", "--steps", 1, "--batch-size", 2)
    assert run("finetune", "--recipe", "r.toml", *few, "-o", "m.safetensors").status == 0
    examples = ("--method", "fisher", "--set", "method.examples=2", "--task", "digits")
    assert run("measure", "--recipe", "r.toml", *examples, "-o", "s").out == "s/digits.safetensors\n"


def test_merge_writes_the_dtype_that_is_asked_for(world: World, run: Run) -> None:
    Path("r.toml").write_text(RECIPE)
    assert (
        run("merge", "r.toml", "--method", "average", "--dtype", "bfloat16", "-o", "m.safetensors").status
        == 0
    )
    assert str(load_file("m.safetensors")["scale"].dtype) == "torch.bfloat16"
    sweep = ("--method", "task_arithmetic", "--sweep", "method.scaling_factor=0.1,0.2", "-o", "swept")
    assert run("merge", "r.toml", *sweep, "--dtype", "float16").status == 0
    assert {str(load_file(each)["scale"].dtype) for each in Path("swept").iterdir()} == {"torch.float16"}
    wrong = run("merge", "r.toml", "--method", "average", "--dtype", "int8", "-o", "m.safetensors")
    assert wrong.status == 2
    assert "--dtype" in wrong.err


@pytest.mark.parametrize(
    "command",
    [["methods"], ["methods", "ties"], ["tasks"], ["tasks", "mnist"], ["info", "t1.safetensors"], ["cache"],
     ["info", "t1.safetensors", "--keys"], ["cos-sim", "--base", "base.safetensors", "t1.safetensors"]],
)  # fmt: skip
def test_json_is_one_thing(world: World, run: Run, command: list[str]) -> None:
    short, long = run(*command, "--json"), run(*command, "--format", "json")
    assert short.out == long.out
    json.loads(short.out)


def test_json_has_numbers_and_names(world: World, run: Run) -> None:
    assert json.loads(run("info", "t1.safetensors", "--format", "json").out)["parameters"] == 5139
    (row,) = json.loads(run("cos-sim", "--base", "base.safetensors", "t1.safetensors", "--json").out)
    assert list(row) == ["name", "t1"]
