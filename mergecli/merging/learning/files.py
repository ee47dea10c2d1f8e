"""What methods that look at images learn before a merge, and the files that it comes from and goes to."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.merging.outputs import Output
from mergecli.methods import name_of
from mergecli.methods._adapted import Adapted
from mergecli.methods._calibrated import Calibrated
from mergecli.methods._settings import frozen
from mergecli.methods.representation_surgery import RepresentationSurgery
from mergecli.recipe.schema import Recipe, recipe_text
from mergecli.results.tables import Table
from mergecli.runtime.errors import InputError, UsageError, quoted, shown
from mergecli.storage.atomic import check_target, check_targets, refuse_inputs, whole_file, write_text
from mergecli.storage.checkpoint import Checkpoint, open_checkpoint
from mergecli.storage.metadata import about

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Lesson:
    """What one output's method has learnt."""

    output: Output
    """With the settings that it was learnt with."""
    learnt: Any = None
    """What `merge` gets; None for methods that look at weights only."""
    files: Mapping[str, Checkpoint] = field(default_factory=dict[str, Checkpoint])
    """Name -> file that the merge reads, besides the models."""
    about: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the merged file says of it."""


@dataclass(frozen=True)
class Learning:
    """Where what is learnt comes from, and goes to."""

    statistics: Path | None = None
    """A folder with a calibrated method's statistics, a file a task; what is not there is measured, and put there."""
    coefficients: Path | None = None
    """A file with what an adapted method learnt; nothing is learnt then."""
    save_coefficients: Path | None = None
    """A file for what an adapted method learns, besides the one in the store."""
    trace: Path | None = None
    """A CSV file with a row for each step of an adapted method."""
    plot: Path | None = None
    """A picture of that."""
    tensorboard: Path | None = None
    """A folder that gets the same for TensorBoard."""

    def check(self, output: Output) -> None:
        """Raises UsageError if the method cannot use a file, or it cannot be written."""
        name, corrects = name_of(output.method), isinstance(output.method, RepresentationSurgery)
        learns = corrects or isinstance(output.method, Adapted)
        if self.statistics and not isinstance(output.method, Calibrated):
            raise UsageError(f"--statistics: method `{name}` measures nothing")
        given = {
            "--coefficients": self.coefficients,
            "--save-coefficients": self.save_coefficients,
            "--trace": self.trace,
            "--tensorboard": self.tensorboard,
            "--plot": self.plot,
        }
        for option, path in given.items():
            if path and not learns:
                raise UsageError(f"{option}: method `{name}` learns no coefficients")
        if self.plot and corrects:
            raise UsageError(
                f"--plot: there is no picture of what `{name}` learns", "`--trace` writes a table"
            )
        if self.coefficients and self.save_coefficients:
            raise UsageError(
                "--save-coefficients: with `--coefficients` nothing is learnt that could be saved"
            )
        targets: list[tuple[Path, tuple[str, ...]]] = [(output.target, ())] if output.target.suffix else []
        targets += [(self.save_coefficients, (".safetensors",))] if self.save_coefficients else []
        targets += [(self.trace, (".csv",))] if self.trace else []
        if self.tensorboard:
            from mergecli.results.tensorboard import require_tensorboard

            require_tensorboard()
            check_target(self.tensorboard, folder=True)
        if self.plot:
            from mergecli.results.plots import require_matplotlib

            require_matplotlib(self.plot)
            targets.append((self.plot, ()))
        check_targets(targets, {"coefficients": self.coefficients} if self.coefficients else {})

    def refuse_inputs(self, output: Output, inputs: Mapping[str, Path]) -> None:
        """Raises UsageError if a file that is to be written is one that is read."""
        for target in (output.target, self.save_coefficients, self.trace, self.plot):
            if target is not None:
                refuse_inputs(target, inputs)


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
    from mergecli.storage.safetensors_writer import save_tensors

    settings = methods.table_of(method)
    metadata = about(
        KIND, method=methods.name_of(method), recipe=recipe_text(recipe, methods.name_of(method), settings), inputs=inputs, tasks=json.dumps(list(tasks)),
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
        from mergecli.results.tensorboard import write_events

        write_events(files.tensorboard, trace)
    if files.plot is not None:
        from mergecli.results.plots.traces import traces

        traces(trace, files.plot)


def _silent(path: Path) -> InputError:
    return InputError(f"{path}: does not say what it was learnt on")
