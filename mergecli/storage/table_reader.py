"""Values taken out of parsed TOML or JSON, with everything that is wrong with them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard, cast

from mergecli.runtime.errors import did_you_mean, toml_text


class Problem(NamedTuple):
    """Something wrong with a table: the dotted key, what was expected there, and the cure where it is known."""

    key: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"`{self.key}`: {self.what}"


@dataclass
class TableReader:
    """Takes values out of a table and collects whatever is wrong with them.

    What is wrong is replaced by a value of the same type, so that reading goes on and finds the rest.
    """

    at_once: bool = False
    """Raise ValueError at the first problem instead."""
    problems: list[Problem] = field(default_factory=list[Problem])

    def wrong(self, key: str, what: str, hint: str = "") -> None:
        """Notes what is wrong with the value of a dotted key."""
        self.problems.append(Problem(key, what, hint))
        if self.at_once:
            raise ValueError(str(self.problems[-1]))

    def expected(self, key: str, what: str, value: object) -> None:
        """Notes that the value of a key is not what was expected."""
        self.wrong(key, f"expected {what}, got {'nothing' if value is None else toml_text(value)}")

    def table(self, value: object, key: str, known: Collection[str] | None = None) -> dict[str, Any]:
        """A table, whose keys are `known` ones."""
        if not isinstance(value, dict):
            self.expected(key, "a table", value)
            return {}
        table = cast("dict[str, Any]", value)
        for name in table if known is not None else ():
            if name not in (known or ()):
                dotted = f"{key}.{name}" if key else name
                self.wrong(dotted, f"unknown key{did_you_mean(name, known or ())}")
        return table

    def whole(self, value: object, key: str, least: int = 0) -> int:
        """A whole number that is not less than `least`."""
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.expected(key, f"a whole number, at least {least}", value)
            return least
        return value

    def number(self, value: object, key: str) -> float:
        """A finite number."""
        if not _is_number(value):
            self.expected(key, "a number", value)
            return 0
        return value

    def flag(self, value: object, key: str) -> bool:
        """True or false."""
        if not isinstance(value, bool):
            self.expected(key, "true or false", value)
        return value is True

    def text(self, value: object, key: str) -> str:
        """A string that is not empty."""
        if not isinstance(value, str) or not value:
            self.expected(key, "a string that is not empty" if value == "" else "a string", value)
            return ""
        return value

    def texts(self, value: object, key: str) -> tuple[str, ...]:
        """One or more strings, none of them empty."""
        values = cast("list[object]", value) if isinstance(value, list) else []
        if not values or not all(isinstance(each, str) and each for each in values):
            self.expected(key, "a list of strings", value)
            return ()
        return tuple(cast("list[str]", values))

    def one_of(self, value: object, key: str, known: Sequence[str]) -> str:
        """One of the `known` words."""
        if text := self.text(value, key):
            if text in known:
                return text
            self.wrong(
                key, f"expected one of {', '.join(known)}, got {toml_text(text)}{did_you_mean(text, known)}"
            )
        return known[0]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
