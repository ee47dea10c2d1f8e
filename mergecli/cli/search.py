"""`mergecli search`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mergecli.cli import amounts, console, ending, options
from mergecli.cli.dry_run import show_plan
from mergecli.runtime.engines.contract import Engine


@options.with_engine
def search(
    engine: Engine,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The models, the base and the tasks.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Gets the study, trials.csv, best.json and parallel.png.")
    ],
    space: Annotated[
        list[str] | None,
        typer.Option(
            "--space", metavar="KEY=RANGE",
            help="A setting and its range, method.density=0.05:0.5[:log|:STEP], or values, method.name=ties,tsv_m. Repeatable.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", metavar="N", min=1, help="How many in all, those done before included.")] = 40,
    sampler: Annotated[
        str, typer.Option("--sampler", metavar="NAME", help="What proposes trials: tpe, sobol, cmaes, random or grid.")
    ] = "tpe",
    objective: Annotated[
        str, typer.Option("--objective", metavar="NAME", help="What is made large: average, worst (the worst task), or a task.")
    ] = "average",
    split: Annotated[
        str, typer.Option("--split", help="The images that trials are compared on; the best is reported on the tasks' own split.")
    ] = "validation",
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the sampler.")] = 0,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Stop trials in the worse half after a part of the tasks, or with --limit of the images."),
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="URL", help="The study's database, for several machines. Default: study.db in DIR."),
    ] = None,
    study: Annotated[str, typer.Option("--study", metavar="NAME", help="The study's name in the database.")] = "search",
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", autocompletion=options.complete_methods, help="Replaces the recipe's [method]."),
    ] = None,
    changes: options.Set = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", autocompletion=options.complete_tasks, help="A task, or a set. Default: the recipe's. Repeatable."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Compare trials on at most N images of each task.")
    ] = None,
    batch_size: options.BatchSize = None,
    device: options.Device = "cpu",
    dtype: options.Precision = "float32",
    workers: options.Workers = None,
    cache: options.Cache = True,
    cache_size: options.CacheSize = None,
    dry_run: options.DryRun = False,
    form: options.Format = None,
) -> None:  # fmt: skip
    """Search the settings whose merge is best: proposed by Optuna, trial by trial.

    The same command resumes an interrupted search. Run it in several processes at once, and they share the trials.

    mergecli search recipe.toml --method ties --space method.scaling_factor=0.05:1.0 --space method.density=0.05:0.5:log -o found/

    mergecli search recipe.toml --space method.name=ties,dare,tsv_m --space method.scaling_factor=0.05:1.0 --trials 60 -o found/
    """
    from mergecli.evaluation.search import search

    console.check_format(form)
    with console.progress() as progress:
        work = partial(
            search, recipe, space or [], output=output, trials=trials, sampler=sampler, objective=objective, split=split, seed=seed,
            prune=prune, storage=storage, study=study, method=method, changes=changes or [],
            tasks=list(options.names("--task", tasks)) or None, limit=limit, batch_size=batch_size, device=device, dtype=dtype,
            workers=workers, cache=cache, cache_size=cache_size, engine=engine, progress=progress,
        )  # fmt: skip
        if dry_run:
            show_plan(work, form)
            return
        found = work()
    console.table(found.table, form)
    if found.importance:
        shares = ", ".join(f"{key} {100 * share:.0f} %" for key, share in found.importance.items())
        console.note(f"importance: {shares}")
    console.note(found.note)
    console.note(f"merge it: {found.command}")
    ending.did(f"compared {amounts.count(len(found.trials), 'trial')}")
    ending.wrote(output / "best.json", output / "trials.csv")
    picture = output / "parallel.png"
    ending.wrote_beside(picture if picture.exists() else None)
