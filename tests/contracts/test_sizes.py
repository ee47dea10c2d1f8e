"""Every module says in its docstring what it is. A long one is reported, since it may hold more than one idea."""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mergecli"
FILES = sorted(PACKAGE.rglob("*.py"))
LIMIT = 400
"""Lines of code, without docstrings, comments and empty lines, from which a file is reported."""


class LongFileWarning(UserWarning):
    """A file that may hold more than one idea."""


def lines_of_code(text: str) -> int:
    """Lines with code on them: no docstring, no comment, nothing empty."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            documented |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    nothing = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            found |= set(range(token.start[0], token.end[0] + 1))
    return len(found - documented)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text("utf-8")))


@pytest.mark.filterwarnings("always::tests.contracts.test_sizes.LongFileWarning")
def test_long_files_are_reported() -> None:
    for file in FILES:
        if (lines := lines_of_code(file.read_text("utf-8"))) > LIMIT:
            text = f"{file.relative_to(PACKAGE)}: {lines} lines of code, more than {LIMIT}: is it one idea?"
            warnings.warn(text, LongFileWarning, stacklevel=1)


def test_only_code_is_counted() -> None:
    assert (
        lines_of_code(
            '"""What it is."""\n\nimport os  # why\n\n# a comment\n\n\ndef f():\n    """Doc."""\n    return os\n'
        )
        == 3
    )
