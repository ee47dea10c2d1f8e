"""Tables, and the text formats they are written in."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from mergecli.results.cells import Cell, Column, Estimate, Plain, Quantity
from mergecli.results.frames import frame
from mergecli.runtime.errors import UsageError
from mergecli.runtime.visible import visible

if TYPE_CHECKING:
    from pandas import DataFrame

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
    in_short: Mapping[str, Sequence[str]] = field(default_factory=dict[str, "Sequence[str]"])
    """A line -> those of the warnings that it stands for where there is little room."""
    figures: tuple[str, ...] = ()
    """Figures, as HTML, after the table on its page."""
    origins: tuple[str, ...] = ()
    """The origin of each row, as HTML, at the end of the page."""
    alike: bool = False
    """Whether the columns after the first say the same of one thing each, so that a terminal may show some at a time."""
    kinds: tuple[str, ...] = ()
    """What each row is, such as `merge`; a `ceiling` is apart from the others. Empty where rows are all alike."""
    best: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the numbers that are bold."""

    def text(self, form: str) -> str:
        """The table as `tsv`, `csv`, `json`, `md`, `latex` or `html`; ends with a newline. Raises UsageError of another format."""
        if form == "html":
            from mergecli.results.html import page

            return page(
                self.columns,
                self.rows,
                kinds=self.kinds,
                best=self.best,
                title=self.title,
                notes=self.notes,
                warnings=self.warnings,
                figures=self.figures,
                origins=self.origins,
            )
        if form in ("tsv", "csv", "json"):
            heads, *rows = self._plain()
            if form == "json":
                keys = [head or "name" for head in heads]
                return json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2) + "\n"
            return csv_text([heads, *rows], mark="," if form == "csv" else "\t")
        heads = [visible(column.name) for column in self.columns]
        right = [column.unit != "text" for column in self.columns]
        if form == "md":
            rule = ["--:" if each else ":--" for each in right]
            lines = [list(map(_markdown, heads)), rule]
            for number, row in enumerate(self._shown(_markdown, "**{}**")):
                lines += [[" "] * len(row)] if number in self.rules else []
                lines.append(row)
            return "".join(f"| {' | '.join(row)} |\n" for row in lines) + self._footnotes("- ", _html_free)
        if form == "latex":
            lines = ["\\toprule", " & ".join(map(_latex, heads)) + " \\\\", "\\midrule"]
            for number, row in enumerate(self._shown(_latex, "\\textbf{{{}}}")):
                lines += ["\\midrule"] if number in self.rules else []
                lines.append(" & ".join(row) + " \\\\")
            inner = "\n".join([*lines, "\\bottomrule"])
            ruled = [a.apart or b.apart for a, b in itertools.pairwise(self.columns)]
            align = "".join(
                "|" * rule + "lr"[each] for rule, each in zip([False, *ruled], right, strict=True)
            )
            return f"\\begin{{tabular}}{{{align}}}\n{inner}\n\\end{{tabular}}\n{self._footnotes('% ', str)}"
        raise UsageError(f"format: expected one of {', '.join(FORMATS)}, got `{form}`")

    def to_frame(self) -> DataFrame:
        """The table as a pandas DataFrame, with the columns of `csv`.

        Raises:
            UsageError: pandas is not installed.
        """
        heads, *rows = self._plain()
        return frame(rows, [str(head) for head in heads])

    @cached_property
    def rules(self) -> frozenset[int]:
        """The rows that a rule stands before: the ceiling, and what follows it."""
        pairs = enumerate(itertools.pairwise(self.kinds), 1)
        return frozenset(row for row, kinds in pairs if kinds.count("ceiling") == 1)

    def _shown(self, safe: Callable[[str], str], bold: str) -> Iterator[list[str]]:
        """The cells of each row as people read them, in the words of a format."""
        for number, row in enumerate(self.rows):
            cells = [safe(visible(c.text(v))) for c, v in zip(self.columns, row, strict=True)]
            yield [bold.format(each) if (number, at) in self.best else each for at, each in enumerate(cells)]

    def transposed(self) -> Table:
        """Rows and columns swapped: the cells of the first column become the headings."""
        apart = [kind == "ceiling" for kind in self.kinds or [""] * len(self.rows)]
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
            self,
            columns=(
                Column(""),
                *(Column(name, "mixed", apart=each) for name, each in zip(heads, apart, strict=True)),
            ),
            rows=tuple(rows),
            kinds=(),
            best=frozenset((column - 1, row + 1) for row, column in self.best),
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

    def _footnotes(self, bullet: str, safe: Callable[[str], str]) -> str:
        lines = [*(f"warning: {each}" for each in self.warnings), *self.notes]
        return "\n" * bool(lines) + "".join(f"{bullet}{safe(visible(line))}\n" for line in lines)


def _bare(value: Cell) -> str | float | Estimate | None:
    return value.value if isinstance(value, Quantity) else value


def _extras(cells: Sequence[str | float | Estimate | None]) -> tuple[str, ...]:
    """The parts of estimates that get separate columns."""
    estimates = [cell for cell in cells if isinstance(cell, Estimate)]
    if any(each.significant is not None for each in estimates):
        return ("low", "high", "significant")
    return ("low", "high") if estimates else ()


def csv_text(
    rows: Iterable[Sequence[Plain]], number: Callable[[float], str] = "{:.6g}".format, mark: str = ","
) -> str:
    """Rows as CSV or, with a tab as `mark`, as TSV. A text that a spreadsheet would compute gets an apostrophe before it,
    which is how one says that it is a text."""

    def written(value: Plain) -> str:
        """A value in a text file; empty for None."""
        if isinstance(value, str):
            text = visible(value, keep="\t")
            return f"'{text}" if _is_formula(text) else text
        if isinstance(value, bool):
            return str(value).lower()
        return number(value) if isinstance(value, float) else "" if value is None else str(value)

    file = io.StringIO()
    writer = csv.writer(file, delimiter=mark, lineterminator="\n")
    writer.writerows([written(value) for value in row] for row in rows)
    return file.getvalue()


def _is_formula(text: str) -> bool:
    """Whether spreadsheets take the text for more than a text; the wide characters are those of Asian keyboards."""
    return len(text) > 1 and text[0] in "=+-@\t\uff1d\uff0b\uff0d\uff20"


def _html_free(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _markdown(text: str) -> str:
    """A name as Markdown shows it: no HTML, no link, no emphasis, and one cell."""
    plain = _html_free(re.sub(r"[\\`*\[\]|~]", r"\\\g<0>", text))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", plain)  # inside a word it is no emphasis


_LATEX = {
    **{character: "\\" + character for character in "&%$#_{}"},
    "\\": "\\textbackslash ", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$",
    "<": "$<$", ">": "$>$", "|": "$|$",
}  # fmt: skip


def _latex(text: str) -> str:
    found = "".join(_LATEX.get(character, character) for character in text)
    # the end of the row before would take it for an argument of its own
    return f"{{}}{found}" if found[:1] in ("[", "*") else found
