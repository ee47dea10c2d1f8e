"""`mergecli export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mergecli.cli import console, ending


def export(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A vision tower, a whole CLIP, an adapter, or FILE#TASK of a mixture.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="A .pt or a .safetensors file.")],
    to: Annotated[str, typer.Option("--to", metavar="LIBRARY", help="Whose names it gets: open_clip.")] = "open_clip",
    clip: Annotated[
        str | None,
        typer.Option("--clip", metavar="SOURCE", help="The CLIP whose text tower and projections it gets; an adapter's base."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON instead.")] = False,
) -> None:  # fmt: skip
    """Write a model as a whole CLIP for another library; prints its path.

    mergecli export merged.safetensors --to open_clip --clip hf:openai/clip-vit-base-patch32 -o merged.pt
    """
    from mergecli.formats.export import export

    with console.progress() as progress:
        found = export(source, output=output, to=to, clip=clip, progress=progress)
    if found.model is not None:
        console.note(f'open_clip.create_model("{found.model}", pretrained="{found.path}") loads it')
    ending.wrote(found.path)
    if as_json:
        console.json(asdict(found) | {"path": str(found.path)})
    else:
        console.path(found.path)
