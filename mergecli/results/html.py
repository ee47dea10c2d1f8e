"""A table as one self-contained web page: no network, no other files."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from html import escape as html_escape
from pathlib import Path
from string import Template

from mergecli.results.cells import Cell, Column, Estimate, Quantity, number_in
from mergecli.runtime.visible import visible

TEMPLATE = Path(__file__).with_name("page.html")


def page(
    columns: Sequence[Column],
    rows: Sequence[tuple[Cell, ...]],
    *,
    kinds: Sequence[str],
    best: Collection[tuple[int, int]],
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

    footnotes = [f'<li class="warning"><strong>Warning:</strong> {escape(each)}</li>' for each in warnings]
    footnotes += [f"<li>{escape(each)}</li>" for each in notes]
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        title=escape(title or "Report"),
        heads="".join(_head(column) for column in columns),
        rows="".join(
            _row(columns, row, kind, {place for at, place in best if at == number})
            for number, (row, kind) in enumerate(zip(rows, kinds or [""] * len(rows), strict=True))
        ),
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
    kind += " apart" * column.apart
    return f'<th scope="col" class="{kind}"><button type="button">{escape(column.name) or "&nbsp;"}</button></th>'


def _row(columns: Sequence[Column], row: tuple[Cell, ...], kind: str, best: Collection[int]) -> str:
    cells = [
        _cell(column, value, place in best)
        for place, (column, value) in enumerate(zip(columns, row, strict=True))
    ]
    name = escape(columns[0].text(row[0]))
    first = f'<th scope="row" title="{name}">{name}</th>'
    return f"<tr{f' class={kind}' if kind else ''}>{first}{''.join(cells[1:])}</tr>\n"


def _cell(column: Column, value: Cell, best: bool) -> str:
    unit = value.unit if isinstance(value, Quantity) else column.unit
    inner = value.value if isinstance(value, Quantity) else value
    number = number_in(inner)
    apart = ["apart"] * column.apart
    if number is None:
        shown = escape(column.text(value)) if inner is not None else "-"
        kind = "none" if inner is None else "text" if column.unit == "text" else "words"
        return f'<td class="{" ".join([kind, *apart])}">{shown}</td>'
    classes, style = ["number", *apart], ""
    if unit == "percent":
        classes.append("share")
        style = f' style="--share:{100 * min(1.0, max(0.0, number)):.0f}%"'
    if unit == "points":
        classes += ["up"] * (number >= 0.0005) + ["down"] * (number <= -0.0005)
    if best:
        classes.append("best")
    text, _, side = Column("", unit).text(inner).partition(" ±")
    title = f"{number:.6g}"
    if isinstance(inner, Estimate):
        title += f" [{inner.low:.6g}, {inner.high:.6g}]"
        if inner.significant is False:
            classes.append("chance")
    ends = f"<small>±{escape(side)}</small>" if side else ""
    return f'<td class="{" ".join(classes)}" data-sort="{number!r}" title="{escape(title)}"{style}>{escape(text)}{ends}</td>'
