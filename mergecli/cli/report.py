"""`mergecli report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergecli.cli import amounts, console, ending, options
from mergecli.runtime import verbosity

if TYPE_CHECKING:
    from mergecli.results.tables import Table


def _complete_references(incomplete: str) -> list[str]:
    from mergecli.results.references import names

    return [name for name in names() if name.startswith(incomplete)]


def _complete_kinds(incomplete: str) -> list[str]:
    from mergecli.results.plots import KINDS

    return [name for name in KINDS if name.startswith(incomplete)]


def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="What `mergecli eval -o` wrote.")],
    sort: Annotated[
        str | None,
        typer.Option("--sort", metavar="average|name|TASK", help="Largest first; names from A to Z. Default: as given."),
    ] = None,
    ascending: Annotated[bool, typer.Option("--ascending", help="With --sort: smallest first.")] = False,
    metric: Annotated[str, typer.Option("--metric", metavar="accuracy|loss", help="What the cells are.")] = "accuracy",
    seen: Annotated[
        list[str] | None,
        typer.Option(
            "--seen", metavar="TASK", autocompletion=options.complete_tasks,
            help="A task whose model was merged: adds averages of seen and unseen tasks. Repeatable.",
        ),
    ] = None,
    normalized: Annotated[
        bool, typer.Option("--normalized", help="Add accuracies divided by those of the fine-tuned models.")
    ] = False,
    fine_tuned: Annotated[
        Path | None, typer.Option("--fine-tuned", metavar="FILE", help="Their result; default: the one called fine-tuned.")
    ] = None,
    intervals: Annotated[bool, typer.Option("--intervals", help="Give each number its 95 % interval.")] = False,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="NAME|FILE", help="Add differences to this result, with 95 % intervals."),
    ] = None,
    predictions: Annotated[
        list[Path] | None,
        typer.Option(
            "--predictions", metavar="FILE",
            help="With --against: what `eval --predictions` wrote. Test the pairs that are there; `n.s.`: not significant. Repeatable.",
        ),
    ] = None,
    p_values: Annotated[
        bool, typer.Option("--p-values", help="With --predictions: add the p-values, Holm-corrected over the rows.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", metavar="NAME", autocompletion=_complete_references,
            help="Compare with a published table, such as clip-vit-base-patch32-ta8.",
        ),
    ] = None,
    reference_rows: Annotated[bool, typer.Option("--reference-rows", help="Add the rows of that table too.")] = False,
    transpose: Annotated[bool, typer.Option("--transpose", help="A row for each task, a column for each model.")] = False,
    plot: options.Plot = None,
    plot_kind: Annotated[
        str | None,
        typer.Option(
            "--plot-kind", metavar="KIND", autocompletion=_complete_kinds,
            help="bars (default), radar, heatmap or sweep (results named like ties-0.3, or with SETTING=VALUE).",
        ),
    ] = None,
    form: options.Format = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the table too; .html, .md, .tex, .csv, .json or .tsv.")
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option("--card", metavar="MODEL", help="Put the table and the model's results into its model card too."),
    ] = None,
    continual: Annotated[
        bool,
        typer.Option(
            "--continual", help="Results are steps of chains, or folders of `mergecli continual`: accuracy after each step, transfer, forgetting.",
        ),
    ] = False,
    steps: Annotated[
        Path | None, typer.Option("--steps", help="With --continual: write each step's accuracies as FusionBench's CSV files have them.")
    ] = None,
) -> None:  # fmt: skip
    """Put results side by side: one row a model, one column a task.

    Accuracies are percent where people read (table, md, latex, html) and fractions where programs do (tsv, csv, json).

    mergecli report out/*.json --reference clip-vit-base-patch32-ta8

    mergecli report out/*.json --against base --intervals -o report.html

    mergecli report --continual chains/opcm chains/average --plot chains.png
    """
    from mergecli.results.card import card_path
    from mergecli.results.report import report

    chosen: Any = console.check_format(form)
    measure: Any = metric
    table = report(
        results, sort=sort, ascending=ascending, metric=measure, seen=",".join(options.names("--seen", seen)), normalized=normalized,
        fine_tuned=fine_tuned, intervals=intervals, against=against, predictions=predictions or (), p_values=p_values,
        reference=reference, reference_rows=reference_rows, transpose=transpose, plot=plot, plot_kind=plot_kind,
        output=output, format=chosen, card=card, continual=continual, steps=steps,
    )  # fmt: skip
    console.table(table, form)
    ending.did(f"compared {amounts.count(len(results), 'result')}")
    ending.wrote(*([output] if output else []))
    ending.wrote_beside(plot, steps, card_path(card) if card else None)
    _warn(table)
    for line in table.notes:
        console.note(line)


def _warn(table: Table) -> None:
    """The table's warnings, of which long lists are told in a line unless all is wanted."""
    short = {} if verbosity.verbose else table.in_short
    left_out = {line for lines in short.values() for line in lines}
    for line in table.warnings:
        if line not in left_out:
            console.warning(line)
    for line in short:
        console.warning(f"{line}: `--verbose` lists them, and so does `-o report.html`")
