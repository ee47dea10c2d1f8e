"""Tables, and the text formats they are written in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mergecli.results.cells import Cell, Column, Estimate, Plain, Quantity
from mergecli.runtime.errors import UsageError

Format = Literal["table", "tsv", "csv", "json", "md", "latex", "html"]
FORMATS: tuple[str, ...] = get_args(Format)
SUFFIXES = {
    ".md": "md", ".tex": "latex", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".html": "html",
}  # fmt: skip
"""The suffix of a file -> the format that it asks for."""


@dataclass(frozen=True)
class Table:
    """Columns and rows, before any formatting."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    notes: tuple[str, ...] = ()
    """Footnotes: how to read the numbers."""
    warnings: tuple[str, ...] = ()
    """Footnotes: why some numbers cannot be compared."""
    figures: tuple[str, ...] = ()
    """Figures, as HTML, after the table on its page."""
    origins: tuple[str, ...] = ()
    """The origin of each row, as HTML, at the end of the page."""

    def text(self, form: str) -> str:
        """The table as `tsv`, `csv`, `json`, `md`, `latex` or `html`; ends with a newline."""
        if form == "html":
            from mergecli.results.html import page

            return page(
                self.columns,
                self.rows,
                title=self.title,
                notes=self.notes,
                warnings=self.warnings,
                figures=self.figures,
                origins=self.origins,
            )
        if form in ("tsv", "csv", "json"):
            heads, *rows = self._plain()
            if form == "json":
                return json.dumps([dict(zip(heads, row, strict=True)) for row in rows], indent=2) + "\n"
            text = io.StringIO()
            writer = csv.writer(text, delimiter="\t" if form == "tsv" else ",", lineterminator="\n")
            writer.writerows([heads, *([_digits(value) for value in row] for row in rows)])
            return text.getvalue()
        heads = [column.name for column in self.columns]
        shown = [[c.text(v) for c, v in zip(self.columns, row, strict=True)] for row in self.rows]
        right = [column.unit != "text" for column in self.columns]
        if form == "md":
            rule = ["--:" if each else ":--" for each in right]
            cells = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in [heads, rule, *shown]]
            return "".join(f"| {' | '.join(row)} |\n" for row in cells) + self._footnotes("- ")
        if form == "latex":
            lines = [f"{' & '.join(map(_latex, row))} \\\\" for row in [heads, *shown]]
            lines.insert(1, "\\midrule")
            align = "".join("r" if each else "l" for each in right)
            inner = "\n".join(["\\toprule", *lines, "\\bottomrule"])
            return f"\\begin{{tabular}}{{{align}}}\n{inner}\n\\end{{tabular}}\n{self._footnotes('% ')}"
        raise UsageError(f"format: expected one of {', '.join(FORMATS)}, got `{form}`")

    def transposed(self) -> Table:
        """Rows and columns swapped: the cells of the first column become the headings."""
        heads: list[str] = []
        for row in self.rows:
            name = self.columns[0].text(row[0])
            same = sum(head == name or head.startswith(f"{name} (") for head in heads)
            heads.append(f"{name} ({same + 1})" if name in heads else name)
        rows = [
            (column.name, *(Quantity(_bare(row[index]), column.unit) for row in self.rows))
            for index, column in enumerate(self.columns)
            if index
        ]
        return replace(
            self, columns=(Column(""), *(Column(name, "mixed") for name in heads)), rows=tuple(rows)
        )

    def _plain(self) -> Iterator[list[Plain]]:
        """Headings, then rows, for programs: fractions, and the ends of an interval in separate columns."""
        cells = [[_bare(value) for value in row] for row in self.rows]
        columns = [[row[index] for row in cells] for index in range(len(self.columns))]
        extras = [_extras(column) for column in columns]
        yield [
            head
            for column, extra in zip(self.columns, extras, strict=True)
            for head in (column.name, *(f"{column.name} {part}" for part in extra))
        ]
        for row in cells:
            plain: list[Plain] = []
            for value, extra in zip(row, extras, strict=True):
                plain.append(value.value if isinstance(value, Estimate) else value)
                plain += [getattr(value, part, None) for part in extra]
            yield plain

    def _footnotes(self, bullet: str) -> str:
        lines = [*(f"warning: {each}" for each in self.warnings), *self.notes]
        return "\n" * bool(lines) + "".join(f"{bullet}{_one_line(line)}\n" for line in lines)


def _bare(value: Cell) -> str | float | Estimate | None:
    return value.value if isinstance(value, Quantity) else value


def _extras(cells: Sequence[str | float | Estimate | None]) -> tuple[str, ...]:
    """The parts of estimates that get separate columns."""
    estimates = [cell for cell in cells if isinstance(cell, Estimate)]
    if any(each.significant is not None for each in estimates):
        return ("low", "high", "significant")
    return ("low", "high") if estimates else ()


def _digits(value: Plain) -> str:
    """A value in a text file; empty for None."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


_LATEX = {
    **{character: "\\" + character for character in "&%$#_{}"},
    "\\": "\\textbackslash ", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in _one_line(text))
