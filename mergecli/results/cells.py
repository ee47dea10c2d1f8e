"""Cells and columns of a table: values with their units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Unit = Literal["text", "count", "percent", "points", "number", "ratio", "probability", "mixed"]
Shows = Literal["interval", "test", "number"]


class Estimate(NamedTuple):
    """A number, its interval, and whether it is significant (None if not tested).

    People are shown one statement on its certainty: `interval` has ± and says nothing of significance, `test` has `n.s.` if
    it is not significant, `number` has neither, since another column has the p-value. Programs get all.
    """

    value: float
    low: float
    high: float
    significant: bool | None = None
    shows: Shows = "interval"


class Quantity(NamedTuple):
    """A cell of a `mixed` column, which has its own unit."""

    value: str | float | Estimate | None
    unit: Unit


Cell = str | float | Estimate | Quantity | None
Plain = str | float | bool | None


def number_in(value: Cell) -> float | None:
    """The number of a cell; None if it has none."""
    if isinstance(value, Quantity):
        value = value.value
    if isinstance(value, Estimate):
        value = value.value
    return value if isinstance(value, int | float) else None


@dataclass(frozen=True)
class Column:
    """The heading of a column, and the unit of its cells."""

    name: str
    unit: Unit = "text"
    optional: bool = False
    """Whether a narrow terminal may do without it."""
    better: Literal["higher", "lower"] | None = None
    """Which of its numbers are good ones; None where that is no question."""
    apart: bool = False
    """Whether rules separate it from its neighbors."""

    def text(self, value: Cell) -> str:
        """The cell as people read it: fractions as percent with one decimal, an interval as its longer side."""
        if isinstance(value, Quantity):
            return Column(self.name, value.unit).text(value.value)
        if isinstance(value, Estimate):
            side = Column("", "percent" if self.unit == "points" else self.unit).text(
                max(value.high - value.value, value.value - value.low)
            )
            if value.shows == "interval":
                return f"{self.text(value.value)} ±{side}"
            by_chance = value.shows == "test" and value.significant is False
            return self.text(value.value) + (" n.s." if by_chance else "")
        if value is None:
            return "-"
        if self.unit in ("percent", "points"):
            rounded = round(100 * float(value), 1) + 0.0  # no -0.0
            return f"{rounded:+.1f}" if self.unit == "points" else f"{rounded:.1f}"
        if self.unit == "probability":
            return f"{float(value):.3f}" if float(value) >= 0.001 else "<0.001"
        if self.unit in ("number", "ratio"):
            return f"{float(value):.{4 if self.unit == 'number' else 2}f}"
        return f"{value:,}" if self.unit == "count" else str(value)
