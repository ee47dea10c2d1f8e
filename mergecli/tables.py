"""`report`: result files to one table, in the formats that people and programs read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mergecli.errors import UsageError
from mergecli.output import check_targets, write_text
from mergecli.references import published_averages
from mergecli.scores import Evaluation, read_result

Format = Literal["table", "tsv", "csv", "json", "md", "latex"]
FORMATS: tuple[str, ...] = get_args(Format)

Unit = Literal["text", "count", "percent", "points", "number"]
Cell = str | int | float | None

_SUFFIXES = {".md": "md", ".tex": "latex", ".json": "json", ".csv": "csv", ".tsv": "tsv"}
_PUBLISHED = {
    "pretrained": "Pre-trained", "fine-tuned": "Fine-tuned (STL)", "average": "Simple Averaging", "task_arithmetic": "Task Arithmetic",
    "ties": "Ties-Merging", "fisher": "Fisher Merging", "reg_mean": "RegMean", "reg_mean_plus_plus": "RegMean++",
    "concrete_task_arithmetic": "Concrete Task Arithmetic", "weight_ensembling_moe": "Weight-Ensembling MoE",
    "efficient_weight_ensembling_moe": "Efficient Weight-Ensembling MoE (90%)",
}  # fmt: skip
"""Our method -> the row of the published tables."""


@dataclass(frozen=True)
class Column:
    """A column's heading and what its cells are."""

    name: str
    unit: Unit = "text"

    def shown(self, value: Cell) -> str:
        """The cell for people: fractions as percent with one decimal."""
        if value is None:
            return "-"
        if self.unit in ("percent", "points"):
            return f"{100 * float(value):+.1f}" if self.unit == "points" else f"{100 * float(value):.1f}"
        if self.unit == "number":
            return f"{float(value):.4f}"
        return f"{value:,}" if self.unit == "count" else str(value)

    def plain(self, value: Cell) -> str:
        """The cell for programs: fractions stay fractions; empty where there is no value."""
        if value is None:
            return ""
        return f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Table:
    """Columns and rows, before any formatting."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""

    def text(self, form: str) -> str:
        """The table as `tsv`, `csv`, `json`, `md` or `latex`; ends with a newline."""
        if form == "json":
            keys = [column.name for column in self.columns]
            return json.dumps([dict(zip(keys, row, strict=True)) for row in self.rows], indent=2) + "\n"
        heads = [column.name for column in self.columns]
        if form in ("tsv", "csv"):
            plain = [[c.plain(v) for c, v in zip(self.columns, row, strict=True)] for row in self.rows]
            text = io.StringIO()
            csv.writer(text, delimiter="\t" if form == "tsv" else ",", lineterminator="\n").writerows(
                [heads, *plain]
            )
            return text.getvalue()
        shown = [[c.shown(v) for c, v in zip(self.columns, row, strict=True)] for row in self.rows]
        right = [column.unit != "text" for column in self.columns]
        if form == "md":
            rule = ["--:" if each else ":--" for each in right]
            cells = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in [heads, rule, *shown]]
            return "".join(f"| {' | '.join(row)} |\n" for row in cells)
        if form == "latex":
            lines = [f"{' & '.join(map(_latex, row))} \\\\" for row in [heads, *shown]]
            lines.insert(1, "\\midrule")
            align = "".join("r" if each else "l" for each in right)
            inner = "\n".join(["\\toprule", *lines, "\\bottomrule"])
            return f"\\begin{{tabular}}{{{align}}}\n{inner}\n\\end{{tabular}}\n"
        raise UsageError(f"format: expected one of {', '.join(FORMATS)}, got `{form}`")


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _latex(text: str) -> str:
    for character in "\\&%$#_{}":
        text = text.replace(character, "\\textbackslash " if character == "\\" else "\\" + character)
    return text


def report(
    results: Sequence[str | Path | Evaluation],
    *,
    reference: str | None = None,
    output: str | Path | None = None,
    format: Format | None = None,
    plot: str | Path | None = None,
) -> Table:
    """One row a result: accuracy on every task and their average; `-` where a result lacks a task.

    Args:
        results: files of `evaluate`, in the order of the rows.
        reference: the name of a published table, such as `clip-vit-base-patch32-ta8`: adds its average for the same
            method and the difference.
        output: a file for the table, in `format` (by default what its suffix says).
        plot: a bar chart (PNG, SVG or PDF).
    """
    if not results:
        raise UsageError(
            "there are no results to report", "name the JSON files that `mergecli eval -o` wrote"
        )
    files = {str(each): Path(each) for each in results if not isinstance(each, Evaluation)}
    targets: dict[Path, Sequence[str]] = {}
    if output:
        targets[Path(output)] = tuple(_SUFFIXES) if format in (None, "table") else ()
    if plot:
        from mergecli.plots import require_matplotlib

        require_matplotlib(Path(plot))
        targets[Path(plot)] = ()
    check_targets(targets, files)
    table = accuracy_table(
        [each if isinstance(each, Evaluation) else read_result(each) for each in results], reference
    )
    if output:
        form = _SUFFIXES[Path(output).suffix] if format in (None, "table") else str(format)
        write_text(Path(output), table.text(form))
    if plot:
        from mergecli.plots import bars

        bars(table, Path(plot))
    return table


def accuracy_table(evaluations: Sequence[Evaluation], reference: str | None = None) -> Table:
    """The table of `report`: model, method, one column a task, average and, with a reference, two more."""
    tasks = list(dict.fromkeys(task for each in evaluations for task in each.tasks))
    columns = [Column("model"), Column("method"), *(Column(task, "percent") for task in tasks)]
    columns.append(Column("average", "percent"))
    published = published_averages(reference) if reference else {}
    if reference:
        columns += [Column("reference", "percent"), Column("difference", "points")]
    rows: list[tuple[Cell, ...]] = []
    for each in evaluations:
        method = each.checkpoint.get("method")
        scores = [each.tasks[task].accuracy if task in each.tasks else None for task in tasks]
        row: list[Cell] = [
            each.name,
            None if method is None else str(method),
            *scores,
            each.average.accuracy,
        ]
        if reference:
            theirs = published.get(_PUBLISHED.get(str(method), ""))
            row += [theirs, None if theirs is None else each.average.accuracy - theirs]
        rows.append(tuple(row))
    return Table(tuple(columns), tuple(rows))
