"""`mergecli info`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergecli.cli import console, ending, options
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.metadata import layer_lines

if TYPE_CHECKING:
    from mergecli.formats.info import Info
    from mergecli.results.tables import Table


def info(
    checkpoint: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="A checkpoint, task vector or file of coefficients, or several side by side; FILE#TASK is a task's tower in a mixture.",
        ),
    ],
    keys: Annotated[bool, typer.Option("--keys", help="List the tensors instead.")] = False,
    recipe: Annotated[
        bool, typer.Option("--recipe", help="Print the recipe it was made with instead.")
    ] = False,
    coefficients: Annotated[
        bool, typer.Option("--coefficients", help="Show only the learned coefficients, tasks by layers.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the learned coefficients: a .png, .svg or .pdf file.")
    ] = None,
    form: options.Format = None,
) -> None:
    """Describe checkpoints: parameters, dtypes, keys, digest, what they were made from, and what was learned.

    mergecli info merged.safetensors

    mergecli info out/*.safetensors

    mergecli info learned.safetensors --plot learned.png
    """
    from mergecli.formats.info import info, known_coefficients

    console.check_format(form)
    single = {"--recipe": recipe, "--coefficients": coefficients, "--plot": plot}
    if len(checkpoint) > 1 and (given := next((option for option, value in single.items() if value), None)):
        raise UsageError(f"{given}: is of one file, got {len(checkpoint)}")
    found = [info(each, plot=plot) for each in checkpoint]
    for each in found:
        for line in each.warnings:
            console.warning(f"{each.path}: {line}")
    one = found[0]
    ending.did(f"read {one.path}" if len(found) == 1 else f"read {len(found)} files")
    if form == "json" and not (keys or recipe or coefficients):
        shown = [asdict(each) for each in found]
        console.json(shown if len(shown) > 1 else shown[0])
    elif recipe:
        console.line(_recipe(one))
    elif coefficients:
        console.table(known_coefficients(one).table(), form)
    elif keys:
        console.table(_keys(found), form)
    else:
        several = len(found) > 1
        learned = [
            replace(each.coefficients.table(), title="learned coefficients" + f" of {each.path}" * several)
            for each in found
            if each.coefficients
        ]
        console.table(_facts(found), form, [_facts(found, short=several), *learned])


def _recipe(found: Info) -> str:
    if "recipe" not in found.metadata:
        is_ours = "mergecli" in found.metadata
        maker = found.metadata.get("method", "another command") if is_ours else "another program"
        raise InputError(
            f"{found.path}: holds no recipe",
            f"it was made by {maker}; `merge`, `taskvector` and `extract` write their recipe into the file",
        )
    return found.metadata["recipe"].rstrip()


def _keys(found: Sequence[Info]) -> Table:
    """The tensors of one file, or of several beside each other."""
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    if len(found) == 1:
        rows = tuple((name, dtype, _shape(shape)) for name, (dtype, shape) in found[0].tensors.items())
        return Table((Column("tensor"), Column("dtype"), Column("shape")), rows)
    names = dict.fromkeys(name for each in found for name in each.tensors)
    held = [
        {name: f"{dtype} {_shape(shape)}".rstrip() for name, (dtype, shape) in each.tensors.items()}
        for each in found
    ]
    return _beside("tensor", found, names, held)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _facts(found: Sequence[Info], *, short: bool = False) -> Table:
    """What one file is, or several beside each other; for people perhaps with short digests."""
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    facts = [_about(each, short=short) for each in found]
    if len(found) == 1:
        return Table((Column("fact"), Column("value")), tuple(facts[0].items()))
    names = dict.fromkeys(name for each in facts for name in each if name != "path")
    return _beside("fact", found, names, facts)


def _beside(
    first: str, found: Sequence[Info], names: Mapping[str, object], values: Sequence[Mapping[str, str]]
) -> Table:
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    columns = (Column(first), *(Column(each.path) for each in found))
    rows = tuple((name, *(each.get(name) for each in values)) for name in names)
    return Table(columns, rows, alike=True)


def _about(found: Info, *, short: bool) -> dict[str, str]:
    def digest(text: str) -> str:
        return f"{text[:17]}…" if short else text

    facts = {
        "path": found.path,
        "kind": found.kind + _note(found),
        "parameters": f"{found.parameters:,}",
        "tensors": str(len(found.tensors)),
        "dtypes": ", ".join(f"{dtype} ({count:,})" for dtype, count in found.dtypes.items()),
        "size": f"{found.size:,} bytes {_where(found.files)}",
        "digest": digest(found.digest),
    }
    facts |= {**found.adapter, **found.mixture, **found.quantized}
    if "mergecli" in found.metadata:
        facts["written by"] = f"mergecli {found.metadata['mergecli']}"
    facts |= {
        key: found.metadata[key]
        for key in ("method", "space", "task", "tower", "transport")
        if key in found.metadata
    }
    facts |= {f"layers {line}": text for line, text in layer_lines(found.metadata).items()}
    return facts | {f"input {name}": digest(each) for name, each in found.inputs.items()}


def _note(found: Info) -> str:
    if found.whole_clip:
        return " (vision tower of a whole CLIP)"
    if found.is_model:
        return ""
    from mergecli.formats.quantized import SHARED
    from mergecli.merging.chain_state import KIND
    from mergecli.storage.cache import LASTING

    return " (no model)" if found.kind in (*LASTING, SHARED, KIND) else " (no model that this version knows)"


def _where(files: int) -> str:
    if not files:
        return "if it had a file of its own, in the dtypes of the whole"
    return f"in {files} file{'s' if files > 1 else ''}"
