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
    quantize: Annotated[
        int | None,
        typer.Option(
            "--quantize",
            metavar="8|4|3|2",
            help="Bits an entry: codes of a few bits in place of differences.",
        ),
    ] = None,
    per: Annotated[
        str | None,
        typer.Option(
            "--per", metavar="row|tensor", help="What shares a step of the quantizer. Default: row."
        ),
    ] = None,
    residual: Annotated[
        bool,
        typer.Option(
            "--residual",
            help="Of a recipe, with --quantize: residuals to the mean of all, which is quantized once.",
        ),
    ] = False,
    changes: options.Set = None,
) -> None:
    """Subtract the base from fine-tuned models; prints the paths of the task vectors.

    mergecli taskvector recipe.toml -o vectors/

    mergecli taskvector toy:digits --base toy:base -o digits.safetensors

    mergecli taskvector recipe.toml -o vectors/ --quantize 4
    """
    from mergecli.merging.taskvector import taskvector

    with console.progress() as progress:
        for path in taskvector(
            tuned,
            output=output,
            base=base,
            dtype=dtype,
            quantize=quantize,
            per=per,
            residual=residual,
            changes=changes or [],
            progress=progress,
        ):
            ending.wrote(path)
            console.path(path)
