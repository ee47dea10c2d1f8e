"""Imports point down, and heavy libraries are imported only where they are used."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mergecli"
RANKS = [
    {"chunks", "devices", "errors", "interrupts", "parallel", "parquet_names", "progress", "layout"},
    {"output", "shards", "sources", "scores", "statistics", "toml_reader"},
    {"recipe", "lock", "checkpoint", "references"},
    {"methods"},
    {
        "adapter_bases",
        "adapter_config",
        "adapter_files",
        "adapters",
        "caching",
        "catalogue",
        "clip",
        "conversion",
        "hub",
        "linear_layers",
        "merge_output",
        "mixtures",
        "models",
        "opening",
        "passes",
        "provenance",
        "toy",
        "views",
    },
    {
        "adapting",
        "correcting",
        "engine",
        "evaluation",
        "events",
        "extraction",
        "fetching",
        "finetuning",
        "inspection",
        "learning",
        "learnt_files",
        "measured",
        "measuring",
        "plots",
        "pool",
        "reporting",
        "similarity",
        "sweep_scores",
        "sweeping",
        "tables",
        "training",
        "vectors",
        "webpage",
    },
    {"mergecli"},
    {"cli", "__main__"},
]
FREE_OF = {
    "methods": {
        "mergecli.checkpoint",
        "mergecli.output",
        "mergecli.sources",
        "mergecli.clip",
        "mergecli.cli",
        "transformers",
    },
    "transformers": {"clip"},
    "datasets": {"clip"},
}


def room(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0]
    return "mergecli" if first == "__init__.py" else first.removesuffix(".py")


def imports(file: Path) -> list[tuple[str, bool]]:
    """(module, whether it is imported for types only) of every import statement."""
    found: list[tuple[str, bool]] = []
    tree = ast.parse(file.read_text("utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "mergecli"
                else [node.module]
            )
            found += [(module, id(node) in typing_only) for module in submodules]
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def rank(name: str) -> int:
    return next(number for number, rooms in enumerate(RANKS) if name in rooms)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    own = room(file)
    for module, typing_only in imports(file):
        parts = module.split(".")
        if parts[0] != "mergecli" or typing_only or own == "mergecli":
            continue
        other = parts[1] if len(parts) > 1 else "mergecli"
        if other != own:
            assert rank(other) <= rank(own), f"{file.name} imports {module}, which is above it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_the_model_room_knows_transformers_and_datasets(file: Path) -> None:
    names = {module.split(".")[0] for module, _ in imports(file)}
    if room(file) != "clip":
        assert names & {"transformers", "datasets"} == set()


@pytest.mark.parametrize("file", sorted((PACKAGE / "methods").glob("*.py")), ids=lambda file: file.name)
def test_methods_are_mathematics_and_know_no_files(file: Path) -> None:
    for module, _ in imports(file):
        if module.startswith("mergecli"):
            assert module.startswith(("mergecli.errors", "mergecli.methods", "mergecli.interrupts")), module


def test_every_room_has_a_rank() -> None:
    assert {room(file) for file in FILES} == set().union(*RANKS)
