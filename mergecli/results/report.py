"""`report`: result files to one table, with intervals, tests and references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from mergecli.results import differences, published, references, suspicions
from mergecli.results import rows as scored
from mergecli.results.card import add_results, check_card
from mergecli.results.cells import Cell, Column
from mergecli.results.pools import refuse_several_pools
from mergecli.results.result import FINE_TUNED, Evaluation, read_result
from mergecli.results.rows import METRICS, Block, Metric, Row, about_images, about_towers
from mergecli.results.tables import SUFFIXES, Format, Table
from mergecli.runtime.errors import UsageError, did_you_mean
from mergecli.storage.atomic import check_targets, write_text


def report(
    results: str | Path | Evaluation | Sequence[str | Path | Evaluation],
    *,
    sort: str | None = None,
    ascending: bool = False,
    metric: Metric = "accuracy",
    seen: Sequence[str] | str = (),
    normalized: bool = False,
    fine_tuned: str | Path | Evaluation | None = None,
    intervals: bool = False,
    against: str | Path | None = None,
    predictions: Sequence[str | Path] = (),
    p_values: bool = False,
    reference: str | None = None,
    reference_rows: bool = False,
    transpose: bool = False,
    plot: str | Path | None = None,
    plot_kind: str | None = None,
    output: str | Path | None = None,
    format: Format | None = None,
    card: str | Path | None = None,
    continual: bool = False,
    steps: str | Path | None = None,
) -> Table:
    """One row a result: accuracy on every task and their average; `-` where a result lacks a task.

    Args:
        results: files of `evaluate`, in the order of the rows.
        sort: `average`, a task, or `name`; largest first unless `ascending`; names from A to Z.
        seen: tasks whose models were merged: adds their average and that of the others.
        normalized: adds each accuracy divided by that of the `fine_tuned` models, by default the result of that name.
        intervals: gives each number its 95 % interval, and differences to a published number theirs.
        against: the name of a result, or the file of one: adds the differences to it, with 95 % intervals.
        predictions: Parquet files of `evaluate`. Pairs of models whose predictions are there are tested image by image,
            and what is not significant is marked.
        p_values: adds the p-values of these tests, corrected for the number of rows.
        reference: the name of a published table, such as `clip-vit-base-patch32-ta8`: adds its average for the same
            method and the difference. `reference_rows` adds its rows too.
        plot: a picture (PNG, SVG or PDF) of `plot_kind`: bars (default), radar, heatmap or sweep.
        output: a file for the table, in `format` (by default what its suffix says).
        card: a merged model, a folder or a file: puts the table into its model card, and its own results into the front
            matter, where hubs read them (`model-index`).
        continual: the results are steps of chains, or folders of `continual`: average accuracy after each step, backward
            transfer and forgetting, mean and standard deviation over the orders. `plot` draws the first two.
        steps: with `continual`, a CSV file with the accuracies of each step, in the columns of FusionBench's.

    Raises:
        UsageError: an argument is wrong. InputError: a file is missing, or not what it should be.
    """
    results = [results] if isinstance(results, (str, Path, Evaluation)) else results
    if not results:
        raise UsageError(
            "there are no results to report", "name the JSON files that `mergecli eval -o` wrote"
        )
    if continual:
        others = {"--sort": sort, "--ascending": ascending, "--seen": seen, "--normalized": normalized, "--fine-tuned": fine_tuned,
                  "--intervals": intervals, "--against": against, "--predictions": predictions, "--p-values": p_values,
                  "--reference": reference, "--reference-rows": reference_rows, "--plot-kind": plot_kind, "--card": card,
                  "--metric": metric != "accuracy"}  # fmt: skip
        if given := [option for option, value in others.items() if value]:
            raise UsageError(f"{given[0]}: does not go with --continual")
        return _of_chains(results, plot, output, format, steps, transpose)
    if steps is not None:
        raise UsageError("--steps: is for `--continual`")
    _check(
        metric, normalized, fine_tuned, intervals, against, predictions, p_values, reference, reference_rows
    )
    read = {str(each): Path(each) for each in [*results, *predictions, *([fine_tuned] if fine_tuned else [])]
            if not isinstance(each, Evaluation)}  # fmt: skip
    _check_files(read | {str(against): Path(against)} if against else read, output, format, plot, plot_kind)
    if card is not None:
        check_card(Path(card))
    theirs = references.find(reference) if reference is not None else None
    evaluations = [_read(each) for each in results]
    tasks = scored.tasks_of(evaluations)
    spelled = seen.split(",") if isinstance(seen, str) else seen
    chosen = scored.chosen_tasks([each for each in spelled if each], tasks, "--seen")
    rows = scored.rows_of(evaluations, metric, chosen or (theirs.seen if theirs else ()))
    if theirs and reference_rows:
        rows += published.rows(theirs, tasks)
    rows = scored.ordered(rows, sort, ascending, tasks)
    blocks = [
        about_towers(rows),
        about_images(rows),
        scored.scores(rows, tasks, metric, intervals),
        suspicions.block(rows, suspicions.suspicions(evaluations), metric, intervals),
    ]
    compared = list(evaluations)
    if normalized:
        compared.append(_fine_tuned(fine_tuned, evaluations))
        blocks.append(scored.normalized(rows, tasks, compared[-1]))
    if theirs:
        blocks.append(published.columns(rows, theirs, intervals))
    if against is not None:
        compared.append(differences.baseline(against, evaluations))
        answers = differences.read_predictions(predictions) if predictions else None
        blocks.append(
            differences.columns(rows, tasks, compared[-1], answers, p_values=p_values, intervals=intervals)
        )
    refuse_several_pools(compared, theirs)
    table = _table(rows, blocks, list(dict.fromkeys(scored.comparable(compared))))
    table = table.transposed() if transpose else table
    if plot or "html" in (format, SUFFIXES.get(Path(output).suffix) if output else None):
        from mergecli.results import pictures

        chart = pictures.chart(rows, tasks, metric, intervals)
        if plot:
            pictures.draw(chart, plot_kind or "bars", Path(plot), evaluations)
        table = replace(
            table,
            figures=pictures.figures(chart, evaluations, plot_kind),
            origins=tuple(map(pictures.origin, evaluations)),
        )
    if output:
        form = SUFFIXES[Path(output).suffix] if format in (None, "table") else str(format)
        write_text(Path(output), table.text(form))
    if card is not None:
        add_results(Path(card), evaluations, table)
    return table


def _of_chains(
    results: Sequence[str | Path | Evaluation], plot: str | Path | None, output: str | Path | None, format: Format | None,
    steps: str | Path | None, transpose: bool,
) -> Table:  # fmt: skip
    """The report of chains, and its files."""
    from mergecli.results import continual

    every = continual.expanded(results)
    read = {str(each): Path(each) for each in every if not isinstance(each, Evaluation)}
    _check_files(read, output, format, plot, None)
    if steps:
        check_targets([(Path(steps), (".csv",))], read)
    chains, warnings = continual.read_chains(every)
    table = continual.table_of(chains, warnings)
    table = table.transposed() if transpose else table
    is_page = "html" in (format, SUFFIXES.get(Path(output).suffix) if output else None)
    if plot or is_page:
        from mergecli.results import plots

        if plot or plots.has_matplotlib():
            figure = plots.chain_curves(chains)
            if plot:
                plots.save(figure, Path(plot))
            table = replace(table, figures=(plots.svg(figure, "chains"),))
    if steps:
        write_text(Path(steps), continual.steps_csv(chains))
    if output:
        form = SUFFIXES[Path(output).suffix] if format in (None, "table") else str(format)
        write_text(Path(output), table.text(form))
    return table


def accuracy_table(evaluations: Sequence[Evaluation]) -> Table:
    """The table of `report` without any option: model, method, a column for each task, and the average."""
    rows = scored.rows_of(evaluations)
    found = scored.scores(rows, scored.tasks_of(evaluations), "accuracy", False)
    return _table(rows, [about_towers(rows), found], [])


def _table(rows: Sequence[Row], blocks: Sequence[Block], warnings: Sequence[str]) -> Table:
    kinds = scored.kinds_of(rows)
    columns: list[tuple[Column, list[Cell]]] = [
        (Column("model"), [row.name for row in rows]),
        (Column("method"), [row.method for row in rows]),
        *(column for block in blocks for column in block.columns),
    ]
    return Table(
        columns=tuple(column for column, _ in columns),
        rows=tuple(tuple(cells[index] for _, cells in columns) for index in range(len(rows))),
        kinds=kinds,
        best=frozenset(scored.best_of(columns, kinds)),
        notes=tuple(note for block in blocks for note in block.notes),
        warnings=(*warnings, *(line for block in blocks for line in block.warnings)),
        in_short={line: whole for block in blocks for line, whole in block.in_short.items()},
    )


def _check(
    metric: str, normalized: bool, fine_tuned: object, intervals: bool, against: object, predictions: object,
    p_values: bool, reference: object, reference_rows: bool,
) -> None:  # fmt: skip
    """Raises UsageError if the options contradict each other."""
    if metric not in METRICS:
        raise UsageError(
            f"--metric: expected one of {', '.join(METRICS)}, got `{metric}`{did_you_mean(metric, METRICS)}"
        )
    of_accuracy = {
        "--normalized": normalized,
        "--intervals": intervals,
        "--against": against,
        "--reference": reference,
    }
    if metric != "accuracy" and (given := [option for option, value in of_accuracy.items() if value]):
        raise UsageError(f"{given[0]}: is about accuracies", f"leave out `--metric {metric}`")
    if reference_rows and not reference:
        raise UsageError("--reference-rows: of which table?", "name it: `--reference NAME`")
    if fine_tuned and not normalized:
        raise UsageError("--fine-tuned: is for `--normalized`")
    if predictions and against is None:
        raise UsageError("--predictions: compare with which model?", "name it: `--against NAME`")
    if p_values and not predictions:
        raise UsageError(
            "--p-values: a test needs the predictions of both models",
            "`mergecli eval --predictions FILE` writes them; give them with `--against NAME --predictions FILE`",
        )


def _check_files(
    inputs: dict[str, Path], output: str | Path | None, format: str | None, plot: str | Path | None, kind: str | None
) -> None:  # fmt: skip
    """Raises UsageError if an output cannot be written, before anything is read."""
    targets: list[tuple[Path, Sequence[str]]] = []
    if output:
        targets.append((Path(output), tuple(SUFFIXES) if format in (None, "table") else ()))
    if plot or kind:
        from mergecli.results.plots import check_kind, require_matplotlib

        if kind:
            check_kind(kind)
        if plot is None and (not output or Path(output).suffix != ".html") and format != "html":
            raise UsageError("--plot-kind: there is no picture to draw", "name its file: `--plot FILE`")
        if plot:
            require_matplotlib(Path(plot))
            targets.append((Path(plot), ()))
    check_targets(targets, inputs)


def _read(result: str | Path | Evaluation) -> Evaluation:
    return result if isinstance(result, Evaluation) else read_result(result)


def _fine_tuned(given: str | Path | Evaluation | None, evaluations: Sequence[Evaluation]) -> Evaluation:
    if given is not None:
        return _read(given)
    found = [
        each
        for each in evaluations
        if FINE_TUNED in (each.name, cast("object", each.checkpoint.get("method")))
    ]
    if len(found) != 1:
        raise UsageError(
            f"--normalized: {len(found) or 'no'} results are called `{FINE_TUNED}`",
            "`mergecli eval --individual` makes one; name its file: `--fine-tuned FILE`",
        )
    return found[0]
