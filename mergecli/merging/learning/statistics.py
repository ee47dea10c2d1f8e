"""What calibrated methods measured: kept as safetensors files, one a task, and found again by content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.merging.models import Models
from mergecli.methods._calibrated import Calibrated
from mergecli.recipe.schema import Recipe
from mergecli.runtime.distributed import is_first, join, wait
from mergecli.runtime.errors import InputError, listed, shown
from mergecli.storage.checkpoint import Checkpoint, open_checkpoint
from mergecli.storage.metadata import about, table_differences
from mergecli.storage.store import home, locate

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.merging.learning.probe import Subject
    from mergecli.runtime.progress import Progress

KIND = "statistics"
"""The `kind` in the metadata of the files."""


@dataclass(frozen=True)
class Stored:
    """Statistics on disk, read as a merge needs them."""

    checkpoints: tuple[Checkpoint, ...]
    device: str
    files: Mapping[str, Checkpoint]
    """What a merge says that it has read -> the file."""
    about: Mapping[str, str]
    """What a merge says of them: the images of each task, their split and number."""

    @property
    def names(self) -> Collection[str]:
        """The names of a file's tensors."""
        return self.checkpoints[0].entries.keys()

    def read(self, file: int, name: str, start: int = 0, stop: int | None = None, /) -> Tensor:
        """(stop - start,) entries of a flattened tensor of the file of that number."""
        stored = self.checkpoints[file]
        values = stored.read_entries(name, start, stored.entries[name].size if stop is None else stop)
        if not math.isfinite(float(values.sum())) and not bool(values.isfinite().all()):
            raise InputError(
                f"{stored.path}: is damaged: `{name}` has NaN or infinity",
                "delete it, and it is measured again",
            )
        return values.to(self.device)


@dataclass(frozen=True)
class StatisticsFile:
    """One file of statistics: what it is measured on, and by which settings."""

    name: str
    path: Path
    subjects: tuple[Subject, ...]
    inputs: Mapping[str, str]
    """Model -> digest."""
    measured: Mapping[str, Any]
    """Method, settings and images."""

    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        method = str(self.measured["method"])
        return about(KIND, method=method, inputs=self.inputs, measured=json.dumps(self.measured))


def statistics(
    models: Models,
    method: Calibrated,
    recipe: Recipe,
    stack: ExitStack,
    progress: Progress | None,
    folder: Path | None = None,
) -> Stored:
    """The statistics of these models, open until `stack` ends; what is not there yet is measured.

    Args:
        folder: where the files lie, and new ones go; by default the store, where they are found by content.

    Raises:
        InputError: the images are missing; or a file is damaged, or was measured on something else.
    """
    files = files_for(models, method, recipe, folder)
    measure_missing(files, models, method, recipe, progress)
    opened = {
        f"statistics of {each.name}": stack.enter_context(_opened(each, models, method)) for each in files
    }
    facts: dict[str, Any] = {}
    for each in opened.values():
        facts |= json.loads(each.metadata["measured"])["tasks"]
    return Stored(tuple(opened.values()), models.device, opened, {"measured": json.dumps(facts)})


def files_for(
    models: Models, method: Calibrated, recipe: Recipe, folder: Path | None
) -> list[StatisticsFile]:
    """The files that a merge needs, there or not."""
    from mergecli.clip.heads import surroundings
    from mergecli.merging.learning.probe import subject

    assert recipe.base is not None
    assert models.base is not None
    name, settings = methods.name_of(method), methods.table_of(method, without=method.late)
    if method.shuffle:
        settings["seed"] = recipe.seed
    common: dict[str, Any] = {"method": name, "settings": settings}
    common["clip"] = surroundings(locate(recipe.base), head=method.needs_head)
    found: list[StatisticsFile] = []
    for tasks in [tuple(models.tuned)] if method.joint else [(task,) for task in models.tuned]:
        title = name if method.joint else tasks[0]
        path = folder / f"{title}.safetensors" if folder else None
        may_lack = path is not None and path.exists()
        subjects = tuple(subject(task, method, recipe, may_lack=may_lack) for task in tasks)
        inputs = {"base": models.base.digest()} | {task: models.tuned[task].digest() for task in tasks}
        measured = common | {"tasks": {each.name: each.facts for each in subjects}}
        if path is None:
            key = hashlib.sha256(json.dumps([inputs, measured]).encode()).hexdigest()[:32]
            path = home() / KIND / name / f"{key}.safetensors"
        found.append(StatisticsFile(title, path, subjects, inputs, measured))
    return found


def measure_missing(
    files: Sequence[StatisticsFile],
    models: Models,
    method: Calibrated,
    recipe: Recipe,
    progress: Progress | None,
) -> tuple[str, ...]:
    """Measures what is not there, once it is known that what is there fits; the names of the new files.

    Several processes share the files among them, each measures some whole, and all wait until none is missing.
    """
    missing = [each for each in files if not each.path.exists()]
    for each in files:
        if each not in missing:
            _opened(each, models, method).close()
    ranks, device = join(models.device)
    wait()  # nobody writes before all have looked
    if own := missing[ranks.own :: ranks.count]:
        from mergecli.merging.learning.probe import Laboratory

        subjects = [one for each in own for one in each.subjects]
        laboratory = Laboratory(method, replace(models, device=device), recipe, subjects)
        for each in own:
            laboratory.write(each.path, each.subjects, each.metadata(), progress if is_first() else None)
    wait()
    if lost := [each.path for each in missing if not each.path.exists()]:
        raise InputError(
            f"{lost[0]}: was measured by another process, and is not here",
            "name a folder that all machines see, or copy the files",
        )
    return tuple(each.name for each in missing)


def _opened(file: StatisticsFile, models: Models, method: Calibrated) -> Checkpoint:
    """The file, once it is known that it is whole and was measured on these models and images, by these settings."""
    stored = open_checkpoint(file.path)
    try:
        _check(stored, file, models, method)
    except BaseException:
        stored.close()
        raise
    return stored


def _check(stored: Checkpoint, file: StatisticsFile, models: Models, method: Calibrated) -> None:
    if stored.metadata.get("kind") != KIND:
        raise InputError(f"{file.path}: are no statistics", "name a folder of its own for statistics")
    try:
        found = {key: json.loads(stored.metadata[key]) for key in ("inputs", "measured")}
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{file.path}: does not say what it was measured on", "delete it") from error
    wanted = json.loads(json.dumps({"inputs": file.inputs, "measured": file.measured}))
    wrong = [
        f"`{key}`: it was measured on {'nothing' if before is None else shown(before)}, wanted is {shown(after)}"
        for key, before, after in table_differences(found, wanted, only_new=True)
    ]
    shapes = {name: models.reference.entries[name].shape for name in models.floats}
    layout = method.layout(shapes)
    have = {name: (entry.dtype, entry.shape) for name, entry in stored.entries.items()}
    if not wrong and have != layout:
        wrong = [f"`{name}`" for name in sorted(layout) if have.get(name) != layout[name]]
        wrong += [f"`{name}` is extra" for name in sorted(have.keys() - layout.keys())]
    if wrong:
        raise InputError(
            f"{file.path}: was not measured on what is merged:\n{listed(wrong)}",
            "name another folder, or delete the file: then it is measured again",
        )
