"""The published tables that results are compared with, as data."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from mergecli.errors import UsageError, did_you_mean, quoted


def names() -> list[str]:
    """Names of the tables: a backbone and a set of tasks."""
    return sorted({f"{row['backbone']}-ta8" for row in _rows()})


def published_averages(name: str) -> dict[str, float]:
    """Row of the published table -> its average accuracy, as a fraction.

    Raises:
        UsageError: there is no such table.
    """
    if name not in names():
        raise UsageError(
            f"unknown reference `{name}`{did_you_mean(name, names())}", f"there are {quoted(names())}"
        )
    rows = [row for row in _rows() if f"{row['backbone']}-ta8" == name and row["table"] == "merged"]
    return {row["row"]: float(row["average"]) / 100 for row in rows}


def _rows() -> list[Mapping[str, str]]:
    with (Path(__file__).parent / "clip-vit-ta8.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
