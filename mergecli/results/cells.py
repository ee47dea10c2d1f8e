"""Cells and columns of a table: values with their units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Unit = Literal["text", "count", "percent", "points", "number", "ratio", "mixed"]


class Estimate(NamedTuple):
    """A number, its interval, and whether it is significant (None if not tested)."""

    value: float
    low: float
    high: float
    significant: bool | None = None


class Quantity(NamedTuple):
    """A cell of a `mixed` column, which has its own unit."""

    value: str | float | Estimate | None
    unit: Unit


Cell = str | float | Estimate | Quantity | None
Plain = str | float | bool | None


@dataclass(frozen=True)
class Column:
    """The heading of a column, and the unit of its cells."""

    name: str
    unit: Unit = "text"
    optional: bool = False
    """Whether a narrow terminal may do without it."""

    def text(self, value: Cell) -> str:
        """The cell as people read it: fractions as percent with one decimal, an interval as its longer side."""
        if isinstance(value, Quantity):
            return Column(self.name, value.unit).text(value.value)
        if isinstance(value, Estimate):
            side = Column("", "percent" if self.unit == "points" else self.unit).text(
                max(value.high - value.value, value.value - value.low)
            )
            return f"{self.text(value.value)} ±{side}" + (" n.s." if value.significant is False else "")
        if value is None:
            return "-"
        if self.unit in ("percent", "points"):
            rounded = round(100 * float(value), 1) + 0.0  # no -0.0
            return f"{rounded:+.1f}" if self.unit == "points" else f"{rounded:.1f}"
        if self.unit in ("number", "ratio"):
            return f"{float(value):.{4 if self.unit == 'number' else 2}f}"
        return f"{value:,}" if self.unit == "count" else str(value)
