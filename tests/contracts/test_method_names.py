"""Adding a method is adding a file: nothing outside the folder names one, and a method says what is its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mergecli import methods
from mergecli.methods._mixture import Mixture

PACKAGE = Path(__file__).parents[2] / "mergecli"
MACHINERY = [file for file in sorted(PACKAGE.rglob("*.py")) if file.parent.name not in ("methods", "cli")]
WORDS = {"average", "linear"}
"""Methods whose names are words of every day."""
MIXTURES = [name for name in methods.names() if issubclass(methods.find(name), Mixture)]
TENSORS = {
    "vision_model.encoder.layers.0.mlp.fc1.weight": (16, 8),
    "vision_model.encoder.layers.0.mlp.fc1.bias": (16,),
    "vision_model.post_layernorm.bias": (8,),
}


def named(file: Path) -> set[str]:
    """The methods that a file imports, or whose name is one of its strings; documentation may name them."""
    tree = ast.parse(file.read_text("utf-8"))
    words = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return set(methods.names()) & (words - WORDS | {module.removeprefix("mergecli.methods.") for module in imported})  # fmt: skip


@pytest.mark.parametrize("file", MACHINERY, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_machinery_names_a_method(file: Path) -> None:
    assert named(file) == set()


def test_a_file_that_names_a_method_would_be_found(tmp_path: Path) -> None:
    file = tmp_path / "machinery.py"
    file.write_text("from mergecli.methods.ties import Ties\nKIND = 'dare'\n")
    assert named(file) == {"ties", "dare"}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_keys_of_a_mixture_are_a_towers_names_or_begin_with_its_own_prefixes(name: str) -> None:
    method = methods.create(name, {"router": "sim"} if "router" in methods.settings(name) else {})
    assert isinstance(method, Mixture)
    keys = {key for tensor, shape in TENSORS.items() for key in method.parts(tensor, shape, 2)}
    keys |= method.extras(TENSORS, 2).keys()
    own = keys - TENSORS.keys()
    assert own
    assert {prefix for prefix in method.prefixes if any(key.startswith(prefix) for key in own)} == set(
        method.prefixes
    )
    assert all(key.startswith(method.prefixes) for key in own)
    assert set(method.prefixes) <= set(methods.key_prefixes())
