"""A table as one self-contained web page: no network, no other files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape as html_escape
from pathlib import Path
from string import Template

from mergecli.results.cells import Cell, Column, Estimate, Quantity
from mergecli.runtime.visible import visible

TEMPLATE = Path(__file__).with_name("page.html")


def page(
    columns: Sequence[Column],
    rows: Sequence[tuple[Cell, ...]],
    *,
    title: str,
    notes: Sequence[str],
    warnings: Sequence[str],
    figures: Sequence[str],
    origins: Sequence[str],
) -> str:
    """The page: the table, sorted by a click on a heading, its footnotes, figures, and the origin of each number.

    `figures` and `origins` are HTML already, everything else is text.
    """
    from mergecli.storage.metadata import version

    best = [_best(columns, rows, index) for index in range(len(columns))]
    footnotes = [f'<li class="warning"><strong>Warning:</strong> {escape(each)}</li>' for each in warnings]
    footnotes += [f"<li>{escape(each)}</li>" for each in notes]
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        title=escape(title or "Report"),
        heads="".join(_head(column) for column in columns),
        rows="".join(_row(columns, row, best) for row in rows),
        notes=f"<ul class='notes'>{''.join(footnotes)}</ul>" if footnotes else "",
        figures="".join(figures),
        origins=f"<h2>How each number was made</h2>{''.join(origins)}" if origins else "",
        version=escape(version()),
    )


def escape(text: str) -> str:
    """A text as it stands in a page: no HTML, and no control characters."""
    return html_escape(visible(text))


def figure(svg: str, caption: str) -> str:
    """A figure with its caption."""
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    wide = ' class="wide"' if size and float(size[1]) > 2 * float(size[2]) else ""
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return f"<figure{wide}>{named}<figcaption>{escape(caption)}</figcaption></figure>"


def _head(column: Column) -> str:
    kind = "text" if column.unit == "text" else "number"
    return f'<th scope="col" class="{kind}"><button type="button">{escape(column.name) or "&nbsp;"}</button></th>'


def _number(value: Cell) -> float | None:
    if isinstance(value, Quantity):
        value = value.value
    if isinstance(value, Estimate):
        value = value.value
    return value if isinstance(value, int | float) else None


def _best(columns: Sequence[Column], rows: Sequence[tuple[Cell, ...]], index: int) -> float | None:
    """The best of our own accuracies in a column; None if there is only one."""
    if columns[index].unit != "percent" or columns[index].name.startswith("reference"):
        return None
    known = [number for row in rows if not _published(row) and (number := _number(row[index])) is not None]
    return max(known) if len(known) > 1 else None


def _published(row: tuple[Cell, ...]) -> bool:
    return len(row) > 1 and row[1] == "published"


def _row(columns: Sequence[Column], row: tuple[Cell, ...], best: list[float | None]) -> str:
    ours = [None] * len(row) if _published(row) else best
    cells = [_cell(*each) for each in zip(columns, row, ours, strict=True)]
    name = escape(columns[0].text(row[0]))
    first = f'<th scope="row" title="{name}">{name}</th>'
    return f"<tr{' class=published' if _published(row) else ''}>{first}{''.join(cells[1:])}</tr>\n"


def _cell(column: Column, value: Cell, best: float | None) -> str:
    unit = value.unit if isinstance(value, Quantity) else column.unit
    inner = value.value if isinstance(value, Quantity) else value
    number = _number(inner)
    if number is None:
        shown = escape(column.text(value)) if inner is not None else "-"
        return f'<td class="{"none" if inner is None else "text" if column.unit == "text" else "words"}">{shown}</td>'
    classes, style = ["number"], ""
    if unit == "percent":
        classes.append("share")
        style = f' style="--share:{100 * min(1.0, max(0.0, number)):.0f}%"'
    if unit == "points":
        classes += ["up"] * (number >= 0.0005) + ["down"] * (number <= -0.0005)
    if best is not None and number == best:
        classes.append("best")
    text, _, side = Column("", unit).text(inner).partition(" ±")
    title = f"{number:.6g}"
    if isinstance(inner, Estimate):
        title += f" [{inner.low:.6g}, {inner.high:.6g}]"
        if inner.significant is False:
            classes.append("chance")
    ends = f"<small>±{escape(side)}</small>" if side else ""
    return f'<td class="{" ".join(classes)}" data-sort="{number!r}" title="{escape(title)}"{style}>{escape(text)}{ends}</td>'
