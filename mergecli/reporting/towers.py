"""The columns of a report that say what the checkpoints are, where not all are plain towers, and what they were shown,
where that was not the same."""

from __future__ import annotations

from collections.abc import Sequence

from mergecli.reporting.rows import Block, Row
from mergecli.scores import FINE_TUNED
from mergecli.tables import Cell, Column


class _Ratio(float):
    """A number that people see with two decimals, and programs in full."""

    def __str__(self) -> str:
        return f"{float(self):.2f}"


def about_towers(rows: Sequence[Row]) -> Block:
    """How large each checkpoint is beside one tower, once one is larger or smaller, and how those of several towers
    are told the task."""
    sizes = [row.result.relative_size if row.result else None for row in rows]
    routings = [row.result.checkpoint.get("routing") if row.result else None for row in rows]
    uneven = any(
        size is not None and f"{size:.2f}" != "1.00" and row.method != FINE_TUNED
        for size, row in zip(sizes, rows, strict=True)
    )
    columns: list[tuple[Column, list[Cell]]] = []
    notes: list[str] = []
    if uneven:
        columns.append((Column("size", "mixed"), [None if size is None else _Ratio(size) for size in sizes]))
        notes.append("size: bytes of the checkpoint, divided by those of the CLIP's own vision tower.")
    if any(routings):
        columns.append((Column("routing"), list(routings)))
        told = {
            "sample": "`sample`, each image by itself",
            "batch": "`batch`, the images of a batch as one, which are of one task, so that the task leaks",
            "task": "`task`, the task is given",
        }
        known = "; ".join(what for name, what in told.items() if name in routings)
        notes += [f"routing: {known}."] if known else []
    return Block(columns, notes)


def about_images(rows: Sequence[Row]) -> Block:
    """Which images each number is of, where rows differ in that."""
    shown = [_images(row) for row in rows]
    if len(set(shown) - {None}) < 2:
        return Block()
    return Block([(Column("images"), list(shown))])


def _images(row: Row) -> str | None:
    """Splits and corruptions, such as `test, contrast 5`; None for a published row."""
    if row.result is None:
        return None
    said = [
        each.split + (f", {each.corruption} {each.severity}" if each.corruption else "")
        for each in row.result.tasks.values()
    ]
    return "; ".join(dict.fromkeys(said))
