"""What is seen on a terminal while libraries load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import Run, World
from tests.faults.test_pipes import on_a_terminal

MERGE = ["merge", "t1.safetensors", "t2.safetensors", "--method", "average", "-o", "m.safetensors"]


def test_a_terminal_shows_what_is_starting_first_and_nothing_of_it_in_the_end(world: World) -> None:
    shown = on_a_terminal(MERGE, world.folder, COLUMNS="80", NO_COLOR="1")
    assert re.match(r"\r⠋ mergecli merge \.\.\.", shown)
    assert ": loading torch ..." in shown
    before, last = shown.rstrip("\r\n").rsplit("\r", 1)[0], shown.splitlines()[-1]
    assert before.rstrip().endswith("m.safetensors")
    assert last.startswith("wrote m.safetensors (xxh3:")


def test_an_error_stands_alone_on_its_line(tmp_path: Path) -> None:
    shown = on_a_terminal(["info", "missing"], tmp_path, NO_COLOR="1")
    assert re.search(r"\r {19}\rerror: missing: no such file or folder\r\n$", shown)


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        (["methods", "--help"], {}),
        (["-q", "methods"], {}),
        (["methods", "ties"], {"TERM": "dumb"}),
        (["methods", "ties"], {"WORLD_SIZE": "2"}),
        (["--version"], {}),
        (["nosuch"], {}),
    ],
)
def test_where_it_would_disturb_there_is_none(
    tmp_path: Path, command: list[str], environment: dict[str, str]
) -> None:
    assert "⠋" not in on_a_terminal(command, tmp_path, **environment)


def test_in_a_pipe_there_is_none(world: World, process: Run) -> None:
    ended = process(*MERGE)
    assert (ended.status, ended.out, ended.err) == (0, "m.safetensors\n", "")


def test_a_narrow_terminal_is_not_filled(tmp_path: Path) -> None:
    shown = on_a_terminal(["info", "missing"], tmp_path, COLUMNS="12", NO_COLOR="1")
    assert shown.startswith("\r⠋ mergecli ")
    assert {len(line) for line in re.findall(r"\r(\S mergecl[^\r]*)", shown)} == {11}
