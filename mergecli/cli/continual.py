"""`mergecli continual`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mergecli.cli import amounts, console, ending, options
from mergecli.cli.dry_run import show_plan
from mergecli.runtime.engines.contract import Engine


@options.with_engine
def continual(
    engine: Engine,
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="Names base, models and method, and in [continual] their orders.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A folder: order-01/step-01.json and so on, and the last merge of each order.")
    ],
    method: Annotated[
        str | None,
        typer.Option(
            "--method", metavar="NAME", autocompletion=options.complete_methods,
            help="Replaces the recipe's [method]; one that can go on from a merge, such as opcm.",
        ),
    ] = None,
    changes: options.Set = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the merges of all steps, and not only the last.")] = False,
    split: Annotated[
        str | None, typer.Option("--split", help="Another split than the task's own, such as train or validation.")
    ] = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = None,
    device: options.Device = "cpu",
    dtype: options.Precision = "float32",
    workers: options.Workers = None,
    cache: options.Cache = True,
    cache_size: options.CacheSize = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Count again what an earlier run has counted.")] = False,
    dry_run: options.DryRun = False,
    form: options.Format = None,
) -> None:  # fmt: skip
    """Merge models one after another and evaluate each step on the tasks seen so far; prints accuracies and forgetting.

    The same command resumes an interrupted one. `mergecli report --continual` compares several.

    mergecli continual recipe.toml --method opcm -o chains/opcm/

    mergecli continual recipe.toml --method average --set continual.orders=10 -o chains/average/ --jobs 4

    mergecli report --continual chains/opcm chains/average --plot chains.png
    """
    console.check_format(form)
    from mergecli.evaluation.continual import continual

    with console.progress() as progress:
        work = partial(
            continual, recipe, output=output, method=method, changes=changes or [], keep=keep, split=split, limit=limit,
            batch_size=batch_size, device=device, dtype=dtype, workers=workers, cache=cache, cache_size=cache_size, fresh=fresh,
            engine=engine, progress=progress,
        )  # fmt: skip
        if dry_run:
            show_plan(work, form)
            return
        done = work()
    if engine.part:
        ending.did(f"did part {engine.part} of the chains")
        return
    table = done.table
    console.table(table, form)
    for line in table.notes:
        console.note(line)
    steps = amounts.count(len(done.results), "step")
    ending.did(f"merged and evaluated {steps} in {amounts.count(len(done.orders), 'order')}")
    ending.wrote(*done.models)
