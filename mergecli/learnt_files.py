"""Files of what methods learn, coefficients, masks, routers and corrections: written with what they were learnt on, read
again only for the same method and tasks, and copied where a user asks."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.checkpoint import Checkpoint, open_checkpoint
from mergecli.errors import InputError, UsageError, quoted, shown
from mergecli.methods._settings import frozen
from mergecli.output import whole_file, write_text
from mergecli.provenance import about
from mergecli.recipe import Recipe
from mergecli.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.learning import Learning

KIND = "coefficients"
"""The `kind` in the metadata of the files."""


def write_learnt(
    path: Path,
    tensors: Mapping[str, Tensor],
    method: methods.Method,
    recipe: Recipe,
    tasks: Collection[str],
    inputs: Mapping[str, str],
    looked_at: object,
    /,
    **more: str,
) -> None:
    """A file whole or not at all. `inputs` are digests by name, `looked_at` is what tells the images, JSON can say it;
    `more` is metadata of the method's own."""
    from mergecli.clip.model import save_tensors

    settings = methods.table_of(method)
    metadata = about(
        KIND, method=methods.name_of(method), recipe=recipe, settings=settings, inputs=inputs, tasks=json.dumps(list(tasks)),
        settings_table=json.dumps(settings), seed=str(recipe.seed), adapted_on=json.dumps(looked_at), **more,
    )  # fmt: skip
    save_tensors(tensors, path, metadata)


def read_learnt(
    path: Path,
    method: methods.Method,
    recipe: Recipe,
    tasks: Collection[str],
    stack: ExitStack,
    ours: Mapping[str, object] | None = None,
    open_: Collection[str] = (),
) -> tuple[Any, Checkpoint]:
    """The method with the settings that it learnt with, and the file, open until `stack` ends.

    `ours` are settings that need not be those it was learnt with: they hold whatever the file says. `open_` are those of
    which the file's hold.

    Raises:
        UsageError: the file is of another method, or of other settings than the recipe's.
        InputError: it is of other tasks, is damaged, or is no such file.
    """
    stored = stack.enter_context(open_checkpoint(path))
    name, metadata = methods.name_of(method), stored.metadata
    if metadata.get("kind") != KIND:
        raise InputError(f"{path}: holds no coefficients", "expected a file that `--save-coefficients` wrote")
    if metadata.get("method") != name:
        raise UsageError(f"{path}: was learnt by `{metadata.get('method')}`, the recipe's method is `{name}`")
    known, settings, looked, _ = (
        said(stored, key) for key in ("tasks", "settings_table", "adapted_on", "seed")
    )
    if not (isinstance(known, list) and isinstance(settings, dict) and isinstance(looked, dict)):
        raise _silent(path)
    if known != list(tasks):
        raise InputError(
            f"{path}: is for the models {quoted(map(str, known))}, in this order; these are {quoted(tasks)}"
        )
    ours, open_ = ours or {}, {*open_, *method.unrecorded}
    given = {key: frozen(value) for key, value in recipe.settings.items() if key not in (*ours, *open_)}
    if differing := [key for key, value in given.items() if frozen(settings.get(key)) != value]:
        learnt = ", ".join(f"`{key} = {shown(settings.get(key))}`" for key in differing)
        wanted = ", ".join(f"`{shown(given[key])}`" for key in differing)
        raise UsageError(
            f"{path}: was learnt with {learnt}, the recipe says {wanted}",
            "leave the setting out, or learn again without `--coefficients`",
        )
    every = {**settings, **ours}
    return methods.create(name, {key: value for key, value in every.items() if value is not None}), stored


def said(stored: Checkpoint, key: str) -> Any:
    """What the file's metadata say of a thing, which is JSON; raises InputError if they do not."""
    try:
        return json.loads(stored.metadata[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise _silent(stored.path) from error


def finite(stored: Checkpoint, name: str, values: Tensor) -> Tensor:
    """Values of the file, if all of them are numbers; else raises InputError."""
    if not bool(values.isfinite().all()):
        raise InputError(f"{stored.path}: `{name}` has NaN or infinity")
    return values


def share(path: Path, trace: Table, files: Learning) -> None:
    """Writes what the user asked for beside the merge: the file itself, and the trace as CSV, events and picture."""
    if files.save_coefficients is not None:
        with whole_file(files.save_coefficients) as file:
            file.write(path.read_bytes())
    if files.trace is not None:
        write_text(files.trace, trace.text("csv"))
    if files.tensorboard is not None:
        from mergecli.events import write_events

        write_events(files.tensorboard, trace)
    if files.plot is not None:
        from mergecli.plots.traces import traces

        traces(trace, files.plot)


def _silent(path: Path) -> InputError:
    return InputError(f"{path}: does not say what it was learnt on")
