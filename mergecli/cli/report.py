"""`mergecli report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergecli.cli import options, show


def _complete_references(incomplete: str) -> list[str]:
    from mergecli.references import names

    return [name for name in names() if name.startswith(incomplete)]


def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="What `mergecli eval -o` wrote.")],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", metavar="NAME", autocompletion=_complete_references,
            help="Compare with a published table, such as clip-vit-base-patch32-ta8.",
        ),
    ] = None,
    form: options.Format = None,
    plot: options.Plot = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the table too; .md, .tex, .csv, .json or .tsv.")
    ] = None,
) -> None:  # fmt: skip
    """Put results side by side: one row a model, one column a task.

    Accuracies are percent where people read (table, md, latex) and fractions where programs do (tsv, csv, json).

    mergecli report out/*.json --reference clip-vit-base-patch32-ta8
    """
    from mergecli import tables

    chosen: Any = show.check_format(form)
    table = tables.report(results, reference=reference, format=chosen, plot=plot, output=output)
    show.table(table, form)
