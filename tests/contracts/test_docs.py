"""What the documents say exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mergecli import methods
from tests.conftest import Run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"^\s*mergecli ([a-z-]+)", README, re.MULTILINE)))


def test_the_readme_shows_every_command() -> None:
    from mergecli.cli import COMMANDS as known

    assert set(known) <= set(COMMANDS)


def test_the_readme_names_every_method() -> None:
    assert [name for name in methods.names() if f"`{name}`" not in README] == []


def test_the_readme_names_every_target_of_the_makefile_it_uses() -> None:
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets |= set(re.findall(r"^([a-z]+):", (ROOT / "recipes" / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make (?:-C \S+ )?([a-z]+)`?", README)) - {"a"} <= targets


def test_make_lists_its_targets() -> None:
    done = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, check=True
    )
    assert "demo" in done.stdout
    assert "test" in done.stdout


@pytest.mark.parametrize(
    "line", sorted(set(re.findall(r"^\s*(mergecli [a-z][^\n#]*)", README, re.MULTILINE)))
)
def test_every_option_in_the_readme_exists(line: str, run: Run) -> None:
    command = line.split()[1]
    shown = run(command, "--help").out
    for option in re.findall(r"(?<=\s)--[a-z-]+", line):
        assert option in shown, f"`{option}` is no option of `{command}`"


def test_the_changelog_has_an_unreleased_part_on_top() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
