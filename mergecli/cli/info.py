"""`mergecli info`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mergecli.cli import console, ending, options
from mergecli.runtime.errors import InputError

if TYPE_CHECKING:
    from mergecli.formats.info import Info


def info(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A checkpoint or task vector; FILE#TASK is a task's tower in a mixture."
        ),
    ],
    keys: Annotated[bool, typer.Option("--keys", help="List the tensors instead.")] = False,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="Print the recipe it was made with instead.")
    ] = False,
    form: options.Format = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Describe a checkpoint: parameters, dtypes, keys, digest, and what it was made from.

    mergecli info merged.safetensors
    """
    from mergecli.formats.info import info
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    console.check_format(form)
    found = info(checkpoint)
    for line in found.warnings:
        console.warning(f"{checkpoint}: {line}")
    ending.did(f"read {checkpoint}")
    if as_json:
        console.json(asdict(found))
        return
    if recipe:
        if "recipe" not in found.metadata:
            maker = (
                found.metadata.get("method", "another command")
                if "mergecli" in found.metadata
                else "another program"
            )
            raise InputError(
                f"{checkpoint}: holds no recipe, as only `merge` writes one", f"it was made by {maker}"
            )
        console.line(found.metadata["recipe"].rstrip())
        return
    if keys:
        rows = tuple(
            (name, dtype, "x".join(map(str, shape))) for name, (dtype, shape) in found.tensors.items()
        )
        console.table(Table((Column("tensor"), Column("dtype"), Column("shape")), rows), form)
        return
    facts = {
        "path": found.path,
        "kind": found.kind + _note(found),
        "parameters": f"{found.parameters:,}",
        "tensors": str(len(found.tensors)),
        "dtypes": ", ".join(f"{dtype} ({count:,})" for dtype, count in found.dtypes.items()),
        "size": f"{found.size:,} bytes {_where(found.files)}",
        "digest": found.digest,
    }
    facts |= {**found.adapter, **found.mixture}
    if "mergecli" in found.metadata:
        facts["written by"] = f"mergecli {found.metadata['mergecli']}"
    facts |= {key: found.metadata[key] for key in ("method", "task", "tower") if key in found.metadata}
    facts |= {f"input {name}": digest for name, digest in found.inputs.items()}
    console.table(Table((Column("fact"), Column("value")), tuple(facts.items())), form)


def _note(found: Info) -> str:
    if found.whole_clip:
        return " (vision tower of a whole CLIP)"
    return "" if found.is_model else " (no model that this version knows)"


def _where(files: int) -> str:
    if not files:
        return "if it had a file of its own, in the dtypes of the whole"
    return f"in {files} file{'s' if files > 1 else ''}"
