"""What adapted methods learn: coefficients and masks, kept as a safetensors file, found again by content, applied
without images."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli import methods
from mergecli.checkpoint import Checkpoint
from mergecli.errors import InputError
from mergecli.learnt_files import KIND, finite, read_learnt, said, share, write_learnt
from mergecli.methods._adapted import UNSAVED, Adapted, Learnt
from mergecli.models import Models
from mergecli.parallel import is_first, is_first_here, join, wait
from mergecli.passes import Passes
from mergecli.progress import Progress
from mergecli.recipe import Recipe
from mergecli.sources import home
from mergecli.tables import Column, Table

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.learning import Learning


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
    used, learnt, stored = _read(path, models, method, recipe, stack)
    if is_first():
        share(path, trace_table(learnt, used, said(stored, "adapted_on")), files)
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
            tensors = {**surveyed, **state, **trace}
            kept = {key: each.contiguous() for key, each in tensors.items() if not key.startswith(UNSAVED)}
            write_learnt(
                path,
                kept,
                method,
                recipe,
                models.tuned,
                work.inputs,
                work.looked_at,
                tensors=json.dumps(models.floats),
            )
        if is_first():
            partial.unlink(missing_ok=True)
        wait()
    return path


def trace_table(learnt: Learnt, method: Adapted, looked_at: Collection[str]) -> Table:
    """A row for each step: the entropy of each task that was looked at, their mean, and each task's coefficient (of
    layer-wise coefficients the mean), or what the method shows instead.

    Row k has the entropies that step k found, which are of the model before it, and the coefficients after it.
    """
    losses, shown = learnt.tensors["trace.entropies"], learnt.tensors["trace.coefficients"]
    looked = [place for place, name in enumerate(learnt.tasks) if name in looked_at]
    columns = ["step", "entropy", *(f"entropy {learnt.tasks[place]}" for place in looked)]
    columns += [method.one_shown] if method.one_shown else [f"coefficient {name}" for name in learnt.tasks]
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


def _read(
    path: Path, models: Models, method: Adapted, recipe: Recipe, stack: ExitStack
) -> tuple[Adapted, Learnt, Checkpoint]:
    """What stands in a file, once it is known that it is of this method and these models."""
    used, stored = read_learnt(path, method, recipe, models.tuned, stack)
    tensors = [str(name) for name in said(stored, "tensors")]
    if set(tensors) != set(models.floats):
        raise InputError(f"{path}: is for models with other tensors")
    shapes = {each: models.reference.entries[each].shape for each in tensors}
    return (
        used,
        _learnt(stored, used, tuple(models.tuned), shapes, said(stored, "seed"), models.device),
        stored,
    )


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
        return finite(stored, key, stored.read_entries(key, start, stop)).to(device)

    held = {
        key: finite(stored, key, stored.read(key)) for key in stored.entries if not key.startswith("logits.")
    }
    return Learnt(tasks, tuple(tensors), held, seed, read)
