"""A table as one web page that needs nothing else: no network, no files beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from mergecli.tables import Cell, Column, Estimate, Quantity, Table

if TYPE_CHECKING:
    from mergecli.scores import Evaluation

TEMPLATE = Path(__file__).with_name("webpage.html")


def page(table: Table) -> str:
    """The whole page: the table, sorted by a click on a heading, its footnotes, and what `table.page` has."""
    from mergecli.provenance import version

    heads = "".join(_head(column) for column in table.columns)
    best = [_best(table, place) for place in range(len(table.columns))]
    rows = "".join(_row(table, row, best) for row in table.rows)
    notes = [f'<li class="warning"><strong>Warning:</strong> {escape(each)}</li>' for each in table.warnings]
    notes += [f"<li>{escape(each)}</li>" for each in table.notes]
    figures = [part for part in table.page if part.startswith("<figure")]
    others = [part for part in table.page if not part.startswith("<figure")]
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        title=escape(table.title or "Report"),
        heads=heads,
        rows=rows,
        notes=f"<ul class='notes'>{''.join(notes)}</ul>" if notes else "",
        figures="".join(figures),
        origins=f"<h2>How each number was made</h2>{''.join(others)}" if others else "",
        version=escape(version()),
    )


def figure(svg: str, caption: str) -> str:
    """A picture with a line under it."""
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    wide = ' class="wide"' if size and float(size[1]) > 2 * float(size[2]) else ""
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return f"<figure{wide}>{named}<figcaption>{escape(caption)}</figcaption></figure>"


def origin(result: Evaluation) -> str:
    """Everything that a result says about where its numbers come from, folded away."""
    values = asdict(result)
    tasks: Mapping[str, Mapping[str, Any]] = values.pop("tasks")
    values["checkpoint"] = dict(result.checkpoint)
    facts = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(_fact(value))}</dd>"
        for key, value in _flat(values)
        if value is not None and value != ""
    )
    keys = list(dict.fromkeys(key for score in tasks.values() for key, _ in _flat(score)))
    heads = "".join(f"<th>{escape(key)}</th>" for key in ("task", *keys))
    rows = "".join(
        f"<tr><th>{escape(task)}</th>{''.join(f'<td>{escape(_fact(dict(_flat(score)).get(key)))}</td>' for key in keys)}</tr>"
        for task, score in tasks.items()
    )
    method = result.checkpoint.get("method")
    about = f" <span>{escape(method)}</span>" if method else ""
    return (
        f"<details><summary>{escape(result.name)}{about}</summary><dl>{facts}</dl>"
        f"<div class='scroll'><table class='origin'><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested keys with a space between, in order."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += (
            _flat(value, f"{prefix}{key} ") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
        )
    return found


def _fact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _head(column: Column) -> str:
    kind = "text" if column.unit == "text" else "number"
    return f'<th scope="col" class="{kind}"><button type="button">{escape(column.name) or "&nbsp;"}</button></th>'


def _number(value: Cell) -> float | None:
    if isinstance(value, Quantity):
        value = value.value
    if isinstance(value, Estimate):
        value = value.value
    return value if isinstance(value, int | float) else None


def _best(table: Table, place: int) -> float | None:
    """The largest accuracy of a column that is ours; None where there is nothing to choose from."""
    if table.columns[place].unit != "percent" or table.columns[place].name.startswith("reference"):
        return None
    known = [
        number for row in table.rows if not _published(row) and (number := _number(row[place])) is not None
    ]
    return max(known) if len(known) > 1 else None


def _published(row: tuple[Cell, ...]) -> bool:
    return len(row) > 1 and row[1] == "published"


def _row(table: Table, row: tuple[Cell, ...], best: list[float | None]) -> str:
    ours = [None] * len(row) if _published(row) else best
    cells = [_cell(*each) for each in zip(table.columns, row, ours, strict=True)]
    name = escape(table.columns[0].shown(row[0]))
    first = f'<th scope="row" title="{name}">{name}</th>'
    return f"<tr{' class=published' if _published(row) else ''}>{first}{''.join(cells[1:])}</tr>\n"


def _cell(column: Column, value: Cell, best: float | None) -> str:
    unit = value.unit if isinstance(value, Quantity) else column.unit
    inner = value.value if isinstance(value, Quantity) else value
    number = _number(inner)
    if number is None:
        shown = escape(column.shown(value)) if inner is not None else "-"
        return f'<td class="{"none" if inner is None else "text" if column.unit == "text" else "words"}">{shown}</td>'
    classes, style = ["number"], ""
    if unit == "percent":
        classes.append("share")
        style = f' style="--share:{100 * min(1.0, max(0.0, number)):.0f}%"'
    if unit == "points":
        classes += ["up"] * (number >= 0.0005) + ["down"] * (number <= -0.0005)
    if best is not None and number == best:
        classes.append("best")
    text, _, side = Column("", unit).shown(inner).partition(" ±")
    title = f"{number:.6g}"
    if isinstance(inner, Estimate):
        title += f" [{inner.low:.6g}, {inner.high:.6g}]"
        if inner.significant is False:
            classes.append("chance")
    ends = f"<small>±{escape(side)}</small>" if side else ""
    return f'<td class="{" ".join(classes)}" data-sort="{number!r}" title="{escape(title)}"{style}>{escape(text)}{ends}</td>'
