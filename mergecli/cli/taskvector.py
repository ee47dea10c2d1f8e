"""`mergecli taskvector`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergecli.cli import console, ending, options


def taskvector(
    tuned: Annotated[str, typer.Argument(metavar="RECIPE|SOURCE", help="A recipe, or one fine-tuned model.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="A .safetensors file; for a recipe, a folder with one a task."),
    ],
    base: options.Base = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16.")] = "float32",
    changes: options.Set = None,
) -> None:
    """Subtract the base from fine-tuned models; prints the paths of the task vectors.

    mergecli taskvector recipe.toml -o vectors/

    mergecli taskvector toy:digits --base toy:base -o digits.safetensors
    """
    from mergecli.merging.taskvector import taskvector

    with console.progress() as progress:
        for path in taskvector(
            tuned, output=output, base=base, dtype=dtype, changes=changes or [], progress=progress
        ):
            ending.wrote(path)
            console.path(path)
