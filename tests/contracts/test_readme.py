"""The README is true: its blocks run as typed, in order, from an empty folder, and print what it shows.

A `console` block is run by bash on a terminal, a `python` block by Python; a `text` block is the end of what the block
before it prints. An `sh` block needs a hub or a copy of the repository, and is only checked for names and options.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mergecli import methods

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BENCHMARKS: dict[str, Any] = json.loads((ROOT / "docs" / "benchmarks.json").read_text("utf-8"))
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Block(NamedTuple):
    """One fenced block, and the line that it begins on."""

    kind: str
    text: str
    line: int


def blocks() -> list[Block]:
    """Every fenced block, in order."""
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [
        Block(each[1], each[2], README[: each.start()].count("\n") + 1) for each in found if each[1] != ""
    ]


def commands(text: str) -> list[str]:
    """The lines of a block that are mergecli's."""
    return re.findall(r"^mergecli [^\n#]*", text, re.MULTILINE)


@pytest.fixture
def terminal(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has installed mergecli and sits at a terminal of 100 columns."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "mergecli"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mergecli "$@"\n')
    program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MERGECLI_HOME": str(tmp_path / "store"),
        "COLUMNS": "100",
        "TERM": "xterm",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
    }


def run(block: Block, folder: Path, environment: dict[str, str]) -> str:
    """What the block prints on a terminal; it must end with status 0."""
    program = ["bash", "-euo", "pipefail"] if block.kind == "console" else [sys.executable]
    theirs, ours = os.openpty()
    with subprocess.Popen(
        [*program, "-c", block.text], cwd=folder, env=environment,
        stdin=subprocess.DEVNULL, stdout=ours, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        os.close(ours)
        printed = bytearray()
        with os.fdopen(theirs, "rb", buffering=0) as reader:
            while part := _some(reader):
                printed += part
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0, f"README.md:{block.line}: status {process.returncode}\n{said}"
    return ANSI.sub("", printed.decode()).replace("\r\n", "\n")


def _some(reader: Any) -> bytes:
    try:
        return reader.read(1 << 16)
    except OSError:  # Linux says so when the last writer is gone
        return b""


def lines(text: str) -> list[str]:
    """The lines that have something on them, without spaces at their ends."""
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_the_blocks_run_as_typed_and_print_what_is_shown(tmp_path: Path, terminal: dict[str, str]) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    printed, shown = "", 0
    for block in blocks():
        if block.kind in ("console", "python"):
            printed = run(block, folder, terminal)
        elif block.kind == "text":
            want = lines(block.text)
            assert lines(printed)[-len(want) :] == want, f"README.md:{block.line}\n{printed}"
            shown += 1
    assert shown >= 2


def test_only_blocks_of_known_kinds_are_there() -> None:
    assert {block.kind for block in blocks()} <= {"console", "text", "python", "sh"}
    assert len(blocks()) == README.count("\n```\n")


def test_it_is_as_long_as_a_visitor_reads() -> None:
    assert 100 <= len(README.splitlines()) <= 180


def test_every_command_is_run_or_shown() -> None:
    from mergecli.cli.app import app

    used = {line.split()[1] for block in blocks() for line in commands(block.text)}
    assert {each.name for each in app().registered_commands} == used


def test_the_table_of_methods_is_what_the_registry_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    table: str = importlib.import_module("readme_methods").table()
    assert table in README, "run `python scripts/readme_methods.py`"
    linked = re.findall(r"\[`(\w+)`\]\(mergecli/methods/(\w+)\.py\)", table)
    assert sorted(linked) == [(name, name) for name in methods.names()]


def test_every_link_leads_to_a_file() -> None:
    targets = re.findall(r'\]\(([^)#]+)\)|(?:src|srcset)="([^"]+)"', README)
    assert [path for pair in targets for path in pair if path and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("line", sorted({line for block in blocks() for line in commands(block.text)}))
def test_every_option_exists_and_every_recipe_is_there(line: str) -> None:
    from typer.main import get_command

    from mergecli.cli.app import app

    command: Any = get_command(app()).commands[line.split()[1]]  # pyright: ignore
    known = {option for parameter in command.params for option in parameter.opts}
    for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", line):
        assert option in known, f"`{option}` is no option of `{line.split()[1]}`"
    for recipe in re.findall(r"recipes/\S+\.toml", line):
        assert (ROOT / recipe).is_file()


def test_the_picture_and_the_tables_are_made_of_the_same_numbers() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import readme_picture
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    for page, text in readme_picture.pages(BENCHMARKS).items():
        assert page.read_text("utf-8") == text
    for theme, colors in readme_picture.THEMES.items():
        file = ROOT / "docs" / "images" / f"benchmark-{theme}.svg"
        assert file.read_text("utf-8") == readme_picture.picture(BENCHMARKS, colors)
