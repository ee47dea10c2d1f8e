"""Values taken out of parsed TOML, with everything that is wrong with them, and on which line it stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from mergecli.errors import UsageError, did_you_mean
from mergecli.sources import Source, parse_source

COMMAND_LINE = "command line"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class Problem(NamedTuple):
    """Something wrong with a recipe: the dotted key and what was expected."""

    key: str
    what: str


@dataclass
class Reader:
    """Takes values out of the parsed TOML and writes down whatever is wrong with them."""

    anchor: Path
    overridden: dict[str, str] = field(default_factory=dict[str, str])
    """Key -> the option that set it."""
    problems: list[Problem] = field(default_factory=list[Problem])

    def wrong(self, key: str, what: str) -> None:
        self.problems.append(Problem(key, what))

    def table(self, value: object, key: str, known: Sequence[str] | None = None) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.wrong(key, f"expected a table, got {value!r}")
            return {}
        table = cast("dict[str, Any]", value)
        for name in table if known is not None else ():
            if name not in (known or ()):
                dotted = f"{key}.{name}" if key else name
                self.wrong(dotted, f"unknown key{did_you_mean(name, known or ())}")
        return table

    def number(self, value: object, key: str, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.wrong(key, f"expected a whole number, at least {least}, got {value!r}")
            return least
        return value

    def text(self, value: object, key: str) -> str:
        if not isinstance(value, str) or not value:
            self.wrong(key, f"expected a string, got {value!r}")
            return ""
        return value

    def texts(self, value: object, key: str) -> tuple[str, ...]:
        values = cast("list[object]", value) if isinstance(value, list) else []
        if not values or not all(isinstance(each, str) and each for each in values):
            self.wrong(key, f"expected a list of strings, got {value!r}")
            return ()
        return tuple(cast("list[str]", values))

    def source(self, value: object, key: str) -> Source | None:
        if text := self.text(value, key):
            anchor = Path() if key in self.overridden else self.anchor
            try:
                return parse_source(text, anchor)
            except UsageError as error:
                self.wrong(key, error.message)
        return None

    def name(self, name: str, key: str) -> str:
        """The name of a task or a model, which files and results are called by."""
        if name == "base" and key.startswith("tuned."):
            self.wrong(key, "`base` is the name of the base: give this model another")
        if name in ("model", "method", "average", "reference", "difference") and key.startswith("tasks."):
            self.wrong(key, "a column of every report has this name: give the task another")
        if not _NAME.fullmatch(name):
            why = "names that begin with an underscore are reserved" if name.startswith("_") else "bad name"
            self.wrong(
                key,
                f"{why}: expected letters, digits, `-`, `_`, `.` or `+`, beginning with a letter or digit",
            )
        return name


def place_of(path: Path | None, text: str, key: str) -> str:
    """`FILE:LINE` of a dotted key; without the line if the key is not in the text."""
    line = line_of(text, key)
    return f"{path or COMMAND_LINE}:{line}" if line else str(path or COMMAND_LINE)


def line_of(text: str, key: str) -> int | None:
    """The line on which a dotted key, or else its table, begins; None if it is not in the text."""
    table, found = "", None
    for number, line in enumerate(text.splitlines(), 1):
        code = line.strip()
        if code.startswith("["):
            table = code.strip("[] ").split("]")[0].replace('"', "").replace(" ", "")
            dotted = table
        elif "=" in code and not code.startswith("#"):
            name = code.split("=", 1)[0].strip().replace('"', "").replace(" ", "")
            dotted = f"{table}.{name}" if table else name
        else:
            continue
        if dotted == key:
            return number
        if found is None and key.startswith(dotted + "."):
            found = number
    return found
