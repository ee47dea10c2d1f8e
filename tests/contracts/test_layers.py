"""Imports point down by room, no file imports itself in a circle, and heavy libraries stay where they are used."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mergecli"
ROOMS = (
    "runtime",
    "storage",
    "data",
    "methods",
    "results",
    "recipe",
    "formats",
    "clip",
    "hub",
    "training",
    "merging",
    "evaluation",
    "cli",
)
"""From the bottom up: a room imports only itself and rooms before it."""
LOOSE = {"__init__.py", "__main__.py"}
METHODS_MAY_IMPORT = ("mergecli.methods", "mergecli.runtime.errors", "mergecli.runtime.interrupts")
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(("mergecli", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in FILES
}


@functools.cache
def imports(file: Path) -> tuple[str, ...]:
    """The modules that the file imports anywhere in it, in functions and for types only too."""
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [module for module in named if module in MODULES]
            if any(module not in MODULES for module in named):
                found.append(node.module)
    return tuple(found)


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0]


def circles(arrows: dict[str, list[str]]) -> list[list[str]]:
    """Every set of more than one node from each of which all others can be reached (Tarjan 1972)."""
    found: list[list[str]] = []
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for other in arrows[node]:
            if other not in number:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], number[other])
        if lowest[node] == number[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(members)

    for node in arrows:
        if node not in number:
            visit(node)
    return found


def test_the_rooms_are_those_of_the_list_and_no_file_lies_outside_them() -> None:
    assert {room(file) for file in FILES} == {*ROOMS, *LOOSE}


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if room(file) not in LOOSE],
    ids=lambda file: str(file.relative_to(PACKAGE)),
)
def test_imports_point_down(file: Path) -> None:
    allowed = ROOMS[: ROOMS.index(room(file)) + 1]
    for module in imports(file):
        if module.split(".")[0] == "mergecli":
            assert module.partition(".")[2].split(".")[0] in allowed, f"`{module}` is above `{room(file)}`"


def test_no_file_imports_itself_in_a_circle() -> None:
    arrows = {
        name: [module for module in imports(file) if module in MODULES and module != name]
        for name, file in MODULES.items()
        if name != "mergecli"  # it names every public function, and nothing below imports it
    }
    assert circles(arrows | {"mergecli": []}) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["a"]}) == [["b", "c"]]


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if room(file) == "methods"],
    ids=lambda file: file.name,
)
def test_methods_are_mathematics_and_know_no_files(file: Path) -> None:
    for module in imports(file):
        assert not module.startswith("mergecli") or module.startswith(METHODS_MAY_IMPORT), module
        assert module.split(".")[0] not in {"transformers", "datasets", "safetensors"}, module
