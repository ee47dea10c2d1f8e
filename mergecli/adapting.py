"""What adapted methods learn: coefficients and masks, kept as a safetensors file, found again by content, applied
without images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mergecli import methods
from mergecli.checkpoint import Checkpoint, open_checkpoint
from mergecli.errors import InputError, UsageError, quoted, shown
from mergecli.methods._adapted import UNSAVED, Adapted, Learnt, State
from mergecli.methods._settings import frozen
from mergecli.models import Models
from mergecli.output import whole_file, write_text
from mergecli.parallel import is_first, is_first_here, join, wait
from mergecli.passes import Passes
from mergecli.progress import Progress
from mergecli.provenance import about
from mergecli.recipe import Recipe
from mergecli.sources import home
from mergecli.tables import Column, Table

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.adaptation import Adaptation
    from mergecli.learning import Learning

KIND = "coefficients"
"""The `kind` in the metadata of the files."""


def coefficients(
    models: Models,
    method: Adapted,
    recipe: Recipe,
    stack: ExitStack,
    progress: Progress | None,
    files: Learning,
) -> tuple[Adapted, Learnt, Checkpoint]:
    """The method with the settings that it learnt with, what it learnt, and the file of that; read, or learnt now.

    Raises:
        UsageError: there are no images for a task, or the file is of another method. InputError: the file is damaged,
            or is of other models.
    """
    path = files.coefficients or _learn(models, method, recipe, progress)
    if files.save_coefficients is not None and is_first():
        with whole_file(files.save_coefficients) as file:
            file.write(path.read_bytes())
    used, learnt, stored = _read(path, models, method, recipe, stack)
    if files.trace is not None and is_first():
        write_text(files.trace, trace_table(learnt).text("csv"))
    if files.tensorboard is not None and is_first():
        from mergecli.events import write_events

        write_events(files.tensorboard, trace_table(learnt))
    if files.plot is not None and is_first():
        from mergecli.plots.traces import traces

        traces(trace_table(learnt), files.plot)
    return used, learnt, stored


def _learn(models: Models, method: Adapted, recipe: Recipe, progress: Progress | None) -> Path:
    """The file of the store with what the method learns on these models and images."""
    from mergecli.clip.adaptation import Adaptation

    work = Adaptation.of(models, method, recipe)
    path = home() / KIND / methods.name_of(method) / f"{work.key}.safetensors"
    ranks, device = join(models.device)
    if not ranks.all(path.exists(), device):
        surveyed = method.survey(Passes(models, method.by_blocks, progress if is_first() else None))
        partial = path.with_suffix(".partial.safetensors")
        state, trace = work.run(surveyed, partial, progress, ranks, device)
        if is_first_here() and not path.exists():
            _write(path, work, {**surveyed, **state}, trace)
        if is_first():
            partial.unlink(missing_ok=True)
        wait()
    return path


def trace_table(learnt: Learnt) -> Table:
    """A row for each step: the entropy of each task that was looked at, their mean, and each task's coefficient (of
    layer-wise coefficients the mean)."""
    losses, shown = learnt.tensors["trace.entropies"], learnt.tensors["trace.coefficients"]
    looked = [place for place in range(len(learnt.tasks)) if losses.numel() and bool(losses[:, place].any())]
    names = learnt.tasks if shown.shape[1] == len(learnt.tasks) else ("all tasks",)
    columns = ["step", "entropy", *(f"entropy {learnt.tasks[place]}" for place in looked)]
    columns += [f"coefficient {name}" for name in names]
    rows = [
        (
            step + 1,
            sum(row[place] for place in looked) / max(len(looked), 1),
            *(row[place] for place in looked),
            *own,
        )
        for step, (row, own) in enumerate(zip(losses.tolist(), shown.tolist(), strict=True))
    ]
    return Table(tuple(Column(name, "number") for name in columns), tuple(rows))


def _write(path: Path, work: Adaptation, state: State, trace: State) -> None:
    from mergecli.clip.model import save_tensors

    method, recipe = work.method, work.recipe
    metadata = about(
        KIND, method=methods.name_of(method), recipe=recipe, settings=methods.table_of(method), inputs=work.inputs,
        tasks=json.dumps(list(work.models.tuned)), tensors=json.dumps(work.models.floats),
        settings_table=json.dumps(methods.table_of(method)), seed=str(recipe.seed), adapted_on=json.dumps(work.looked_at),
    )  # fmt: skip
    kept = {key: each.contiguous() for key, each in {**state, **trace}.items() if not key.startswith(UNSAVED)}
    save_tensors(kept, path, metadata)


def _read(
    path: Path, models: Models, method: Adapted, recipe: Recipe, stack: ExitStack
) -> tuple[Adapted, Learnt, Checkpoint]:
    """What stands in a file, once it is known that it is of this method and these models."""
    stored = stack.enter_context(open_checkpoint(path))
    name, metadata = methods.name_of(method), stored.metadata
    if metadata.get("kind") != KIND:
        raise InputError(f"{path}: holds no coefficients", "expected a file that `--save-coefficients` wrote")
    if metadata.get("method") != name:
        raise UsageError(f"{path}: was learnt by `{metadata.get('method')}`, the recipe's method is `{name}`")
    tasks, tensors, settings, seed = _facts(path, metadata)
    if tasks != tuple(models.tuned):
        raise InputError(
            f"{path}: is for the models {quoted(tasks)}, in this order; these are {quoted(models.tuned)}"
        )
    if set(tensors) != set(models.floats):
        raise InputError(f"{path}: is for models with other tensors")
    given = {key: frozen(value) for key, value in recipe.settings.items()}
    differing = [key for key, value in given.items() if frozen(settings.get(key)) != value]
    if differing:
        raise UsageError(
            f"{path}: was learnt with "
            + ", ".join(f"`{key} = {shown(settings.get(key))}`" for key in differing)
            + ", the recipe says " + ", ".join(f"`{shown(given[key])}`" for key in differing),
            "leave the setting out, or learn again without `--coefficients`",
        )  # fmt: skip
    used = cast("Adapted", methods.create(name, settings))
    shapes = {each: models.reference.entries[each].shape for each in tensors}
    return used, _learnt(stored, used, tasks, shapes, seed, models.device), stored


def _facts(
    path: Path, metadata: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Any], int]:
    """Tasks, merged tensors, settings and seed, as the file says."""
    try:
        tasks, tensors, settings = (
            json.loads(metadata[key]) for key in ("tasks", "tensors", "settings_table")
        )
        json.loads(metadata["adapted_on"])
        return tuple(map(str, tasks)), tuple(map(str, tensors)), dict(settings), int(metadata["seed"])
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: does not say what it was learnt on") from error


def _learnt(
    stored: Checkpoint,
    method: Adapted,
    tasks: tuple[str, ...],
    tensors: Mapping[str, tuple[int, ...]],
    seed: int,
    device: str,
) -> Learnt:
    """What the file holds, once it is known that nothing is missing; masks are read when they are needed."""
    for key, shape in method.shapes(len(tasks), tensors).items():
        have = stored.entries[key].shape if key in stored.entries else None
        if have != shape:
            found = "is missing" if have is None else f"has shape {have}"
            raise InputError(f"{stored.path}: `{key}` {found}, expected shape {shape}")

    def read(key: str, start: int, stop: int) -> Tensor:
        return _finite(stored, key, stored.read_entries(key, start, stop)).to(device)

    held = {
        key: _finite(stored, key, stored.read(key)) for key in stored.entries if not key.startswith("logits.")
    }
    return Learnt(tasks, tuple(tensors), held, seed, read)


def _finite(stored: Checkpoint, key: str, tensor: Tensor) -> Tensor:
    """The tensor, if all of it are numbers; else raises InputError."""
    if not bool(tensor.isfinite().all()):
        raise InputError(f"{stored.path}: `{key}` has NaN or infinity")
    return tensor
