"""A file is one idea: small enough to print, or its docstring says why not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mergecli"
LIMIT = 250


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_a_file_is_small_or_says_why_not(file: Path) -> None:
    text = file.read_text("utf-8")
    lines = len(text.splitlines())
    document = ast.get_docstring(ast.parse(text)) or ""
    assert document, "every module says in a sentence what it is"
    assert lines <= LIMIT or "Longer than" in document, f"{lines} lines"
