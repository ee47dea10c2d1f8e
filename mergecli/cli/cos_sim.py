"""`mergecli cos-sim`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergecli.cli import amounts, console, ending, options


def cos_sim(
    vectors: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|[NAME=]SOURCE...", help="Task vectors; or a recipe, or models with --base."
        ),
    ],
    base: options.Base = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write a CSV file with all digits.")
    ] = None,
    layers: Annotated[
        Path | None, typer.Option("--layers", help="Write the cosines of every layer too, as CSV.")
    ] = None,
    plot: options.Plot = None,
    form: options.Format = None,
    changes: options.Set = None,
) -> None:
    """Cosine similarities between task vectors.

    mergecli cos-sim vectors/*.safetensors -o cos.csv --plot cos.png
    """
    from mergecli.merging.cos_sim import cos_sim
    from mergecli.storage.sources import named_sources

    console.check_format(form)
    with console.progress() as progress:
        result = cos_sim(
            Path(vectors[0]) if options.is_recipe(vectors) else named_sources(vectors),
            base=base, output=output, layers=layers, plot=plot, changes=changes or [], progress=progress,
        )  # fmt: skip
    console.table(result.table(), form)
    ending.did(f"compared {amounts.count(len(result.names), 'task vector')}")
    ending.wrote(*([output] if output else []))
    ending.wrote_beside(layers, plot)
