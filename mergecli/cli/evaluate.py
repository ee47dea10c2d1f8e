"""`mergecli eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergecli.cli import options, show
from mergecli.errors import ThresholdError, UsageError


def evaluate(
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
        str | None,
        typer.Option(
            "--tasks", metavar="TASK,...", autocompletion=options.complete_tasks,
            help="Tasks or sets such as ta8; `mergecli tasks` lists them.",
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="NAME,...", help="Which of the recipe's models; `base` is its base.")
    ] = None,
    individual: Annotated[
        bool, typer.Option("--individual", help="Each model only on the task it is named after, in one result.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A .json file; for several checkpoints, a folder.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="Write label and prediction of every image (Parquet).")
    ] = None,
    min_average: Annotated[
        float | None,
        typer.Option("--min-average", metavar="X", help="Exit with status 5 if an average accuracy is below X (0 to 1)."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Another split than the task's own, such as train.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Images at a time.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")] = "cpu",
    form: options.Format = None,
    changes: options.Set = None,
) -> None:  # fmt: skip
    """Evaluate vision towers zero-shot: the share of each task's images that they classify rightly.

    mergecli eval out/ties.safetensors --recipe recipe.toml -o out/ties.json

    mergecli eval --individual --recipe recipe.toml -o out/fine-tuned.json

    mergecli eval toy:base toy:digits --clip toy:base --tasks toy8
    """
    if min_average is not None and not 0 <= min_average <= 1:
        raise UsageError(f"--min-average: expected a fraction from 0 to 1, got {min_average:g}")
    show.check_format(form)
    from mergecli import evaluation
    from mergecli.catalogue import read_recipe
    from mergecli.sources import named_sources
    from mergecli.tables import accuracy_table

    if changes and recipe is None:
        raise UsageError("--set: there is no recipe to change", "name one with `--recipe`")
    known = read_recipe(recipe, changes or []) if recipe else None
    with show.progress() as progress:
        results = evaluation.evaluate(
            named_sources(checkpoints or []) or (), recipe=known, only=only.split(",") if only else (), individual=individual, clip=clip, tasks=tasks.split(",") if tasks else None, batch_size=batch_size,
            split=split, device=device, output=output, predictions=predictions, progress=progress,
        )  # fmt: skip
    table = accuracy_table(results)
    show.table(table, form)
    if min_average is not None:
        below = [result for result in results if result.average.accuracy < min_average]
        if below:
            lines = [f"{each.checkpoint['path']}: {each.average.accuracy:.4f}" for each in below]
            raise ThresholdError(f"average accuracy below {min_average:g}: {'; '.join(lines)}")
