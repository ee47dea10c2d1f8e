"""`mergecli extract`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mergecli.cli import console, ending, options


def extract(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A task vector; or a fine-tuned model, with --base.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The adapter's folder.")],
    base: options.Base = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Of every module.")] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="Or the share of each change's squared norm to keep, in (0, 1]."),
    ] = None,
    modules: Annotated[
        str | None,
        typer.Option(
            "--modules", metavar="NAMES", help="Such as q_proj,v_proj. Default: the encoder's linear layers."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16.")] = "float32",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print ranks, errors and sizes as JSON instead.")
    ] = False,
) -> None:
    """Extract a low-rank adapter from a task vector or a fine-tuned model; prints its folder.

    mergecli extract merged.safetensors --base toy:base --rank 8 -o merged-lora/

    mergecli extract vectors/digits.safetensors --energy 0.9 --modules q_proj,v_proj -o digits-lora/
    """
    from mergecli.merging.extract import extract

    with console.progress() as progress:
        found = extract(
            source,
            output=output,
            base=base,
            rank=rank,
            energy=energy,
            modules=[name.strip() for name in modules.split(",")] if modules is not None else (),
            dtype=dtype,
            progress=progress,
        )
    lost = f"its distance to the model is {found.error:.2%} of the whole change"
    if found.dropped:
        console.warning(
            f"{len(found.dropped)} tensors changed and are not in the adapter: {lost}, in its own modules "
            f"{found.error_of_modules:.2%}"
        )
    else:
        console.note(f"every tensor that changed is in the adapter: {lost}")
    larger = ", which is less: take a lower rank or energy" if found.size > found.tower_size else ""
    console.note(f"the adapter has {found.size:,} bytes, the tower {found.tower_size:,}{larger}")
    ending.wrote(found.path)
    if as_json:
        console.json(asdict(found) | {"path": str(found.path)})
    else:
        console.path(found.path)
