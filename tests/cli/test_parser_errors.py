"""What the parser refuses, in the words of all other messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("merg recipe.toml", "no such command `merg` (did you mean `merge`?)"),
        ("zzz", "no such command `zzz`"),
        ("merge recipe.toml --methd ties -o m", "no such option `--methd` (did you mean `--method`?)"),
        (
            "finetune --task a --learning-rte 1 -o m",
            "no such option `--learning-rte` (did you mean `--learning-rate`?)",
        ),
        ("merge recipe.toml --zzz", "no such option `--zzz`"),
        ("merge recipe.toml", "-o/--output is missing"),
        ("report", "argument RESULT.json... is missing"),
        ("eval a --limit 0", "--limit: expected a whole number, at least 1, got `0`"),
        ("eval a --limit x", "--limit: expected a whole number, at least 1, got `x`"),
        ("eval a --severity 7", "--severity: expected a whole number from 1 to 5, got `7`"),
        ("eval a --min-average x", "--min-average: expected a number, got `x`"),
    ],
)
def test_what_the_parser_refuses_says_what_was_expected_and_got(run: Run, line: str, message: str) -> None:
    ended = run(*line.split())
    command = "" if message.startswith("no such command") else f" {line.split()[0]}"
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == f"error: {message}\nhint: `mergecli{command} --help` shows what is expected\n"


@pytest.mark.parametrize("command", ["merge", "cos-sim"])
def test_a_name_that_is_neither_a_file_nor_a_recipe_is_told_so(run: Run, command: str) -> None:
    more = ["-o", "m.safetensors"] if command == "merge" else []
    ended = run(command, "nosuchrecipe", *more)
    assert (ended.status, ended.err) == (3, (
        "error: nosuchrecipe: no such file or recipe\nhint: a recipe's name ends in `.toml`\n"
    ))  # fmt: skip


def test_a_recipe_whose_suffix_was_left_out_is_found(run: Run, tmp_path: Path) -> None:
    (tmp_path / "toy.toml").write_text('base = "toy:base"\n')
    assert run("merge", "toy", "-o", "m").err.startswith(
        "error: toy: no such file or recipe (did you mean `toy.toml`?)\n"
    )
    assert (
        run("merge", "tooy.toml", "-o", "m").err
        == "error: tooy.toml: no such recipe (did you mean `toy.toml`?)\n"
    )
