"""`mergecli eval`."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergecli.cli import amounts, console, ending, options
from mergecli.cli.dry_run import show_plan
from mergecli.cli.thresholds import check_thresholds, parse_thresholds
from mergecli.runtime.engines.contract import Engine
from mergecli.runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergecli.results.result import Evaluation


def _complete_corruptions(incomplete: str) -> list[str]:
    from mergecli.data.corruptions import NAMES

    return [name for name in NAMES if name.startswith(incomplete)]


def _complete_ensembles(incomplete: str) -> list[str]:
    return [
        kind for kind in ("logits", "probabilities", "weighted", "confidence") if kind.startswith(incomplete)
    ]


@options.with_engine
def evaluate(
    engine: Engine,
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(metavar="[[NAME=]SOURCE...]", help="Checkpoints or task vectors; none: the recipe's models."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Takes base, tasks and batch size from this recipe.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option("--clip", metavar="SOURCE", help="The CLIP whose text tower makes the heads.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task", metavar="TASK", autocompletion=options.complete_tasks,
            help="A task, or a set such as ta8; `mergecli tasks` lists them. Repeatable.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME", help="Which of the recipe's models; `base` is its base. Repeatable."),
    ] = None,
    individual: Annotated[
        bool, typer.Option("--individual", help="Each model only on the task it is named after, in one result.")
    ] = False,
    ensemble: Annotated[
        list[str] | None,
        typer.Option(
            "--ensemble", metavar="KIND", autocompletion=_complete_ensembles,
            help="Add a row for all of them together: logits or probabilities (means), weighted, or confidence. Repeatable.",
        ),
    ] = None,
    ensemble_weights: Annotated[
        list[str] | None,
        typer.Option("--ensemble-weight", metavar="NAME=X", help="Of a checkpoint in the weighted ensemble. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A .json file; for several checkpoints, a folder.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="Write label and prediction of every image (Parquet).")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option("--features", metavar="DIR", help="Write the class token after every layer (DIR/TASK.safetensors)."),
    ] = None,
    routes: Annotated[
        Path | None,
        typer.Option("--routes", metavar="DIR", help="Of towers that route: write the mean weight of each expert (DIR/NAME.csv, .png)."),
    ] = None,
    min_average: Annotated[
        float | None,
        typer.Option("--min-average", metavar="X", help="Exit with status 5 if an average accuracy is below X (0 to 1)."),
    ] = None,
    min_task: Annotated[
        list[str] | None,
        typer.Option("--min", metavar="TASK=X", help="The same for the accuracy on one task. Repeatable."),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Another split than the task's own, such as train or validation.")
    ] = None,
    limit: options.Limit = None,
    corruption: Annotated[
        str | None,
        typer.Option(
            "--corruption", metavar="NAME", autocompletion=_complete_corruptions,
            help="Corrupt every image, such as gaussian_noise or motion_blur (after ImageNet-C).",
        ),
    ] = None,
    severity: Annotated[
        int | None, typer.Option("--severity", min=1, max=5, help="Of the corruption; default 1.")
    ] = None,
    batch_size: options.BatchSize = None,
    device: options.Device = "cpu",
    dtype: options.Precision = "float32",
    workers: options.Workers = None,
    cache: options.Cache = True,
    cache_size: options.CacheSize = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start again instead of resuming an interrupted evaluation.")
    ] = False,
    routing: Annotated[
        str,
        typer.Option("--routing", metavar="sample|batch", help="Of towers that route: for each image, or once per batch."),
    ] = "sample",
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep", metavar="KEY=VALUES",
            help="Merge the recipe's models for each value, such as method.scaling_factor=0.1:1.0:0.1, and evaluate each merge. Repeatable.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", metavar="NAME", autocompletion=options.complete_methods, help="With --sweep: replaces the recipe's [method].",
        ),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option("--select", metavar="SPLIT", help="With --sweep: choose the best on this split, such as validation."),
    ] = None,
    keep: Annotated[Path | None, typer.Option("--keep", metavar="DIR", help="With --sweep: keep the checkpoints.")] = None,
    plot: options.Plot = None,
    dry_run: options.DryRun = False,
    form: options.Format = None,
    changes: options.Set = None,
) -> None:  # fmt: skip
    """Evaluate vision towers zero-shot: accuracy and loss on each task.

    Processed images and heads are cached for the next evaluation. The same command resumes an interrupted one.

    mergecli eval out/ties.safetensors --recipe recipe.toml -o out/ties.json

    mergecli eval --individual --recipe recipe.toml -o out/fine-tuned.json

    mergecli eval toy:base toy:digits --clip toy:base --task toy8

    mergecli eval --recipe recipe.toml --method ties --sweep method.scaling_factor=0.1:1.0:0.1 --select validation

    mergecli eval --recipe recipe.toml --ensemble logits,confidence

    mergecli eval --recipe recipe.toml -o out/ --gpus all
    """
    if min_average is not None and not 0 <= min_average <= 1:
        raise UsageError(f"--min-average: expected a fraction from 0 to 1, got {min_average:g}")
    console.check_format(form)
    from mergecli.evaluation.evaluate import evaluate
    from mergecli.recipe.reading import recipe_of
    from mergecli.results.report import accuracy_table
    from mergecli.results.result import result_files
    from mergecli.storage.sources import named_sources

    named = list(options.names("--task", tasks)) or None
    models = options.names("--model", only)
    kinds = options.names("--ensemble", ensemble)
    weights = _weights(ensemble_weights or [])
    chosen = {"--split": split, "--corruption": corruption, "--select": select}
    for option, text in chosen.items():
        if text is not None and not text.strip(" ,"):
            raise UsageError(f"{option}: is empty", "leave the option out for its default")
    if severity is not None and corruption is None:
        raise UsageError("--severity: there is no corruption", "name one with `--corruption`")
    if changes and recipe is None:
        raise UsageError("--set: there is no recipe to change", "name one with `--recipe`")
    known = recipe_of(recipe, method=method, changes=changes or []) if recipe else None
    thresholds = parse_thresholds(min_task or [], named, known) if min_task else {}
    if engine.part and (
        option := "--min-average" if min_average is not None else "--min" if min_task else None
    ):
        raise UsageError(f"{option}: a part of the units has no average", "give it with `--collect`")
    swept = {"--method": method, "--select": select, "--keep": keep, "--plot": plot}
    if sweep:
        from mergecli.evaluation.sweep import sweep as evaluate_sweep

        whole = {"a checkpoint": checkpoints, "--model": only, "--individual": individual, "--ensemble": kinds,
                 "--ensemble-weight": weights, "--predictions": predictions,
                 "--features": features, "--routes": routes, "--clip": clip}  # fmt: skip
        if (other := next((name for name, value in whole.items() if value), None)) is not None:
            raise UsageError(
                f"--sweep: evaluates merges of the recipe's models, and does not go with {other}"
            )
        if recipe is None:
            raise UsageError("--sweep: there is nothing to merge", "name a recipe with `--recipe`")
        with console.progress() as progress, _the_others_shown(form):
            work = partial(
                evaluate_sweep, recipe, sweep, method=method, changes=changes or [], select=select, keep=keep, output=output, plot=plot,
                device=device, progress=progress, tasks=named, batch_size=batch_size, split=split, limit=limit,
                corruption=corruption, severity=severity or 1, dtype=dtype, workers=workers, cache=cache, cache_size=cache_size,
                fresh=fresh, routing=routing, engine=engine,
            )  # fmt: skip
            if dry_run:
                show_plan(work, form)
                return
            found = work()
        if engine.part:
            ending.did(f"did part {engine.part} of the sweep")
            return
        console.table(found.table, form)
        console.note(found.note)
        ending.did(f"evaluated {amounts.count(len(found.results), 'merge')} on {_tasks(found.results)}")
        names = [*(point.name for point in found.points), "best"]
        ending.wrote(*result_files(names, output))
        ending.wrote_beside(plot)
        check_thresholds([found.confirmed or found.results[found.best]], thresholds, min_average)
        return
    if (other := next((name for name, value in swept.items() if value), None)) is not None:
        raise UsageError(f"{other}: belongs to a sweep", "say over what with `--sweep KEY=VALUES`")
    with console.progress() as progress, _the_others_shown(form):
        work = partial(
            evaluate, named_sources(checkpoints or []) or (), recipe=known, only=models,
            individual=individual, ensemble=kinds, ensemble_weights=weights, clip=clip, tasks=named, batch_size=batch_size, split=split, limit=limit,
            corruption=corruption, severity=severity or 1, device=device, dtype=dtype, workers=workers, cache=cache,
            cache_size=cache_size, fresh=fresh, routing=routing, output=output, predictions=predictions, features=features,
            routes=routes, engine=engine, progress=progress,
        )  # fmt: skip
        if dry_run:
            show_plan(work, form)
            return
        results = work()
    if engine.part:
        ending.did(f"did part {engine.part} of the evaluation")
        return
    console.table(accuracy_table(results), form)
    shown = results[0].models if individual else [each for each in results if not each.is_ensemble]
    ending.did(f"evaluated {amounts.count(len(shown), 'checkpoint')} on {_tasks(results)}")
    ending.wrote(*result_files([str(each.checkpoint["name"]) for each in results], output))
    ending.wrote_beside(predictions, features, routes)
    check_thresholds(results, thresholds, min_average)


def _weights(texts: list[str]) -> dict[str, float]:
    """Checkpoint -> weight, from texts `NAME=X`."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not name or not 0 <= weight < math.inf:
            raise UsageError(f"--ensemble-weight {text}: expected `NAME=X` with a number X of at least 0")
        if name in found:
            raise UsageError(f"--ensemble-weight {text}: `{name}` has one already, {found[name]:g}")
        found[name] = weight
    return found


def _tasks(results: Sequence[Evaluation]) -> str:
    return amounts.count(len({task for each in results for task in each.tasks}), "task")


@contextmanager
def _the_others_shown(form: str | None) -> Generator[None]:
    """After units have failed: a table of what could be put together all the same."""
    from mergecli.results.report import accuracy_table
    from mergecli.runtime.engines.grid import FailedUnitsError

    try:
        yield
    except FailedUnitsError as error:
        if error.results:
            console.table(getattr(error.results, "table", None) or accuracy_table(error.results), form)
        raise
