"""The files of what a method learns: those that the user names, how they are read, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.merging.merge_target import MergeTarget
from mergecli.methods import name_of
from mergecli.methods._base import DataDriven
from mergecli.methods._calibrated import measured_by
from mergecli.methods._learned import Learner
from mergecli.methods._settings import frozen
from mergecli.recipe.schema import Recipe
from mergecli.results.plan import Work
from mergecli.results.tables import Table
from mergecli.runtime.distributed import are_several, is_first_here
from mergecli.runtime.errors import InputError, UsageError, listed, quoted, toml_text
from mergecli.runtime.progress import Progress
from mergecli.storage.atomic import check_target, check_targets, refuse_inputs, whole_file, write_text
from mergecli.storage.cache import is_stored, kept
from mergecli.storage.checkpoint import Checkpoint, open_checkpoint
from mergecli.storage.differences import Form, differences
from mergecli.storage.store import home

if TYPE_CHECKING:
    from torch import Tensor


def _those_that_keep(kind: str) -> str:
    """The methods that keep files of that kind, as a hint."""
    kinds = {name: methods.find(name) for name in methods.names()}
    able = [name for name, each in kinds.items() if issubclass(each, DataDriven) and each.kept_as == kind]
    return f"these do: {quoted(able, 20)}"


@dataclass(frozen=True)
class Learned:
    """What the method of one merge has learned."""

    target: MergeTarget
    """With the settings that the method learned with."""
    value: Any = None
    """What the method's `merge` gets; None for methods that read weights only."""
    files: Mapping[str, Checkpoint] = field(default_factory=dict[str, Checkpoint])
    """Name -> file that the merge reads besides the models."""
    about: Mapping[str, str] = field(default_factory=dict[str, str])
    """Metadata of the merged file."""


@dataclass(frozen=True)
class LearningPlan:
    """What a dry run says of the learning."""

    work: Sequence[Work] = ()
    memory: int = 0
    """Bytes that it holds, as far as the measurement has not held them."""


@dataclass(frozen=True)
class Learning:
    """What the method of one merge has to learn: everything is checked, and nothing is learned yet."""

    expected: Learned
    """What `learn` will return, as far as it is known: perhaps without a value and files."""
    inputs: Sequence[str]
    """The names of the files."""
    learn: Callable[[Progress | None], Learned]
    plan: Callable[[], LearningPlan] = LearningPlan


@dataclass(frozen=True)
class LearningFiles:
    """Files that the user names; None where an option is not given."""

    statistics: Path | None = None
    """A folder of statistics, a file a task; missing ones are measured and written there."""
    coefficients: Path | None = None
    """A file of coefficients to apply; then nothing is learned."""
    save_coefficients: Path | None = None
    """A copy of the file of coefficients that is learned."""
    trace: Path | None = None
    """A CSV file with a row for each step of the learning."""
    plot: Path | None = None
    """A plot of the trace."""
    tensorboard: Path | None = None
    """A folder for TensorBoard's events of the trace."""

    def check(self, target: MergeTarget) -> None:
        """Raises UsageError if the method has no use for a file that is named, or it cannot be written."""
        method, name = target.method, name_of(target.method)
        measures = measured_by(method) is not None
        kept_as = "statistics" if measures else method.kept_as if isinstance(method, DataDriven) else ""
        if self.statistics and kept_as != "statistics":
            raise UsageError(
                f"--statistics: method `{name}` measures nothing", _those_that_keep("statistics")
            )
        given = {
            "--coefficients": self.coefficients,
            "--save-coefficients": self.save_coefficients,
            "--trace": self.trace,
            "--tensorboard": self.tensorboard,
            "--plot": self.plot,
        }
        for option, path in given.items():
            if path and kept_as != "coefficients":
                hint = _those_that_keep("coefficients")
                raise UsageError(f"{option}: method `{name}` learns no coefficients", hint)
        if self.plot and not (isinstance(method, Learner) and method.has_plot):
            raise UsageError(
                f"--plot: there is no picture of what `{name}` learns", "`--trace` writes a table"
            )
        if self.coefficients and self.save_coefficients:
            raise UsageError(
                "--save-coefficients: with `--coefficients` nothing is learned, so there is nothing to save"
            )
        targets: list[tuple[Path, tuple[str, ...]]] = [(target.path, ())] if target.path.suffix else []
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

    def refuse_inputs(self, target: MergeTarget, inputs: Mapping[str, Path]) -> None:
        """Raises UsageError if an output would replace one of the inputs."""
        for path in (target.path, self.save_coefficients, self.trace, self.plot):
            if path is not None:
                refuse_inputs(path, inputs)


KIND = "coefficients"
"""The `kind` in the metadata of the files."""
CURE = "learn it again: merge without this file, with `--save-coefficients`"


def read_learned(
    path: Path,
    method: Learner,
    recipe: Recipe,
    tasks: Collection[str],
    stack: ExitStack,
    ours: Mapping[str, object],
    from_file: Collection[str],
) -> tuple[Learner, Checkpoint]:
    """The file, open until `stack` ends, and the method with the settings that it was learned with.

    Args:
        ours: settings whose value counts, whatever the file says.
        from_file: settings whose value is the file's, whatever the recipe says.

    Raises:
        UsageError: the file is of another method, or of other settings than the recipe's.
        InputError: it is of other tasks, is damaged, or is no such file.
    """
    stored = stack.enter_context(open_checkpoint(path, cure=CURE))
    name, metadata = methods.name_of(method), stored.metadata
    if metadata.get("kind") != KIND:
        raise InputError(f"{path}: holds no coefficients", "expected a file that `--save-coefficients` wrote")
    stored.expect_checksums(CURE)
    if metadata.get("method") != name:
        raise UsageError(
            f"{path}: was learned by `{metadata.get('method')}`, the recipe's method is `{name}`",
            f"use `--method {metadata.get('method')}`, or learn again without `--coefficients`",
        )
    known, settings, looked, _ = (
        json_field(stored, key) for key in ("tasks", "settings_table", "adapted_on", "seed")
    )
    if not (isinstance(known, list) and isinstance(settings, dict) and isinstance(looked, dict)):
        raise _silent(path)
    if known != list(tasks):
        raise InputError(
            f"{path}: is for the models {quoted(map(str, known))}, in this order; these are {quoted(tasks)}",
            "name the same models in that order, or learn again without `--coefficients`",
        )
    free = {*ours, *from_file, *method.not_recorded, "layers"}
    given = {key: frozen(value) for key, value in recipe.settings.items() if key not in free}
    if differing := [key for key, value in given.items() if frozen(settings.get(key)) != value]:
        learned = ", ".join(f"`{key} = {toml_text(settings.get(key))}`" for key in differing)
        wanted = ", ".join(f"`{toml_text(given[key])}`" for key in differing)
        raise UsageError(
            f"{path}: was learned with {learned}, the recipe says {wanted}",
            "leave the setting out, or learn again without `--coefficients`",
        )
    every = {**settings, **ours}
    used = methods.create(name, {key: value for key, value in every.items() if value is not None})
    assert isinstance(used, Learner)
    return used, stored


def is_whole(path: Path) -> bool:
    """Whether the file is there.

    One process finds out that a file of the store is damaged as it reads it, and begins again. Of several none can: the
    others are at other places. So the first of each machine looks at all of it now, and removes it if it is damaged, with a
    note.
    """
    if path.exists() and are_several() and is_first_here() and path.is_relative_to(home()):
        return kept(path, "it is made", lambda stored: stored.digest()) is not None
    return is_stored(path)


def json_field(stored: Checkpoint, key: str) -> Any:
    """The JSON value of a key of the file's metadata; raises InputError if it is missing or no JSON."""
    try:
        return json.loads(stored.metadata[key])
    except (KeyError, ValueError, RecursionError) as error:
        raise _silent(stored.path) from error


def expect(stored: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError unless the file has float32 tensors of these shapes."""
    have = {key: entry for key, entry in stored.entries.items() if key in shapes}
    if wrong := differences(have, {key: Form(shape, "F32") for key, shape in shapes.items()}):
        raise InputError(f"{stored.path}: is not what its metadata says:\n{listed(wrong)}")


def finite(stored: Checkpoint, name: str, values: Tensor) -> Tensor:
    """(...) the values of a tensor of the file; raises InputError if one is NaN or infinity."""
    if not bool(values.isfinite().all()):
        raise InputError(f"{stored.path}: `{name}` has NaN or infinity")
    return values


def share(path: Path, trace: Table, files: LearningFiles) -> None:
    """Copies the file to where the user asked for it, and writes its trace as CSV, events and plot."""
    if files.save_coefficients is not None:
        with whole_file(files.save_coefficients) as file:
            file.write(path.read_bytes())
    if files.trace is not None:
        write_text(files.trace, trace.text("csv"))
    if files.tensorboard is not None:
        from mergecli.results.tensorboard import write_tensorboard

        write_tensorboard(files.tensorboard, trace)
    if files.plot is not None:
        from mergecli.results.plots.traces import traces

        traces(trace, files.plot)


def _silent(path: Path) -> InputError:
    return InputError(f"{path}: does not say what it was learned on")
