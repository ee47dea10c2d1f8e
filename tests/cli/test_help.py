"""Help that fits, in panels, with examples that can be pasted."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from typer.main import get_command

from mergecli.cli import COMMANDS, help
from mergecli.cli.app import app
from tests.conftest import Run

PROGRAM: Any = get_command(app())


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_list_of_commands_is_not_cut(run: Run, columns: int) -> None:
    shown = run("--help", COLUMNS=columns).out
    assert "..." not in shown.partition("Commands:")[2]
    assert set(re.findall(r"^  ([a-z-]+) ", shown.partition("Commands:")[2], re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_line_is_longer_than_the_terminal(run: Run, command: str) -> None:
    lines = run(command, "--help", COLUMNS=80).out.splitlines()
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_metavars_are_capitals_in_every_command(command: str) -> None:
    for each in PROGRAM.commands[command].params:
        if each.param_type_name == "option" and not each.is_flag:
            assert re.fullmatch(r"[A-Z_=:/\[\] ]+|[a-zA-Z|]+\|[a-zA-Z|]+|[0-9](\|[0-9])+", each.metavar), (
                each.opts
            )


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_what_the_docstring_says_in_lines_that_a_shell_joins(run: Run, command: str) -> None:
    wanted = [
        part for part in (PROGRAM.commands[command].help or "").split("\n\n") if part.startswith("mergecli ")
    ]
    for columns in (60, 100):
        shown = run(command, "--help", COLUMNS=columns).out.partition("\nExamples:\n")[2]
        script = shlex.split(shown.replace("\\\n", " ").replace("\n  mergecli", "\n; mergecli"))
        assert shlex.join(script).replace("';'", ";") == " ; ".join(
            shlex.join(shlex.split(each)) for each in wanted
        )


def test_panels_name_options_that_exist(run: Run) -> None:
    for command, panels in help.PANELS.items():
        known = {max(each.opts, key=len) for each in PROGRAM.commands[command].params}
        named = [name for text in panels.values() for name in text.split()]
        assert set(named) - {"--jobs"} <= known, command
        assert len(named) == len(set(named))
        shown = run(command, "--help").out
        assert [line for line in shown.splitlines() if line.rstrip(":") in panels] == [
            f"{each}:" for each in panels
        ]
