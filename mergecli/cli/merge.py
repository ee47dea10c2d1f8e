"""`mergecli merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergecli.cli import options, show
from mergecli.errors import UsageError


def merge(
    models: Annotated[list[str], typer.Argument(metavar="RECIPE|[NAME=]SOURCE...", help="A recipe, or models.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A .safetensors file, or a folder (no suffix) for transformers.")
    ],
    base: options.Base = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", metavar="NAME", autocompletion=options.complete_methods,
            help="Replaces the recipe's [method]; `mergecli methods` lists them.",
        ),
    ] = None,
    changes: options.Set = None,
    device: Annotated[str, typer.Option("--device", help="Where the method computes: cpu, cuda, cuda:1, ...")] = "cpu",
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", metavar="SIZE", help="Split a folder's weights, such as 2GB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written and its digests as JSON.")] = False,
) -> None:  # fmt: skip
    """Merge fine-tuned models into one checkpoint; prints its path.

    mergecli merge recipe.toml --method ties --set method.density=0.1 -o out/ties.safetensors

    mergecli merge --base toy:base toy:digits toy:letters --method task_arithmetic -o merged.safetensors
    """
    from mergecli import engine
    from mergecli.sources import named_sources

    if options.is_recipe(models):
        if base is not None:
            raise UsageError("--base: a recipe names its base itself", "use `--set base=...` to change it")
        what: Path | dict[str, str] = Path(models[0])
        settings_go_to = method
    else:
        if method is None and not any(change.startswith("method.name") for change in changes or []):
            raise UsageError("no method is named", "`--method NAME`; `mergecli methods` lists them")
        what, settings_go_to = named_sources(models), method
    with show.progress() as progress:
        merged = engine.merge(
            what,
            output=output,
            base=base,
            method=settings_go_to,
            changes=changes or [],
            device=device,
            shard_size=shard_size,
            progress=progress,
        )
    for text in merged.warnings:
        show.warning(text)
    if as_json:
        import json

        show.line(
            json.dumps(
                {"path": str(merged.path), "method": merged.method, "tasks": merged.tasks, "tensors": merged.tensors,
                 "parameters": merged.parameters, "inputs": merged.inputs}, indent=2,
            )
        )  # fmt: skip
    else:
        show.line(str(merged.path))
