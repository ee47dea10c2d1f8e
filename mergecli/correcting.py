"""What representation surgery corrects, a merged tower, and what it learns: kept as a safetensors file, found again by
content, applied without images."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli import methods
from mergecli.checkpoint import Checkpoint
from mergecli.errors import InputError, UsageError
from mergecli.learning import Learning, Lesson
from mergecli.learnt_files import KIND, finite, read_learnt, share, write_learnt
from mergecli.merge_output import Output
from mergecli.methods.representation_surgery import DOWN, UP, RepresentationSurgery, Surgeries
from mergecli.mixtures import mixture_of
from mergecli.models import Models, check_fit
from mergecli.opening import open_source
from mergecli.parallel import is_first
from mergecli.progress import Progress
from mergecli.recipe import Recipe
from mergecli.sources import Source, home, parse_source
from mergecli.tables import Column, Table

if TYPE_CHECKING:
    from torch import Tensor

MERGED, LEARNT = "merged tower", "learnt surgery"
"""What a result calls the files that it is made of, besides the models; no task has such a name."""


def surgery(
    models: Models, output: Output, stack: ExitStack, progress: Progress | None, files: Learning
) -> Lesson:
    """The merged tower and the corrections, read or learnt now; files stay open until `stack` ends.

    Raises:
        UsageError: no merged tower is named, there are no images for a task, or the file is of another method.
        InputError: a file is damaged, or does not fit the models.
    """
    method, recipe = output.method, output.recipe
    assert isinstance(method, RepresentationSurgery)
    source = _source(method)
    merged = _opened(source, models, recipe, stack)
    files.refuse_inputs(output, {MERGED: merged.files[0]})
    method = replace(method, merged=source.label)  # without the folders of its path
    if not is_first():  # the first of several processes learns, and writes
        return Lesson(replace(output, method=method))
    path = files.coefficients or _learnt(models, merged, method, recipe, progress)
    own, found = {"merged": method.merged}, () if method.feature_size else ("feature_size",)
    used, stored = read_learnt(path, method, recipe, models.tuned, stack, ours=own, open_=found)
    _check(stored, used, len(models.tuned))
    share(path, trace_table(stored, tuple(models.tuned)), files)

    def read(name: str, start: int, stop: int) -> Tensor:
        values = merged.read_entries(name, start, stop).float()
        return finite(merged, name, values).to(models.device)

    learnt = Surgeries(stored.read(DOWN), stored.read(UP), read)
    facts = {"adapted_on": stored.metadata["adapted_on"]}
    return Lesson(replace(output, method=used), learnt, {MERGED: merged, LEARNT: stored}, facts)


def _source(method: RepresentationSurgery) -> Source:
    if method.merged is None:
        raise UsageError(
            "`method.merged`: no merged tower is named that the surgery could correct",
            "make one with another method, such as `mergecli merge RECIPE --method ada_merging -o ada.safetensors`; "
            "then name it with `--set method.merged=ada.safetensors`",
        )
    return parse_source(method.merged, Path())


def _opened(source: Source, models: Models, recipe: Recipe, stack: ExitStack) -> Checkpoint:
    """The tower that is corrected, once it is known that it fits the models."""
    merged = stack.enter_context(open_source(source, recipe.base)).vision()
    if merged.is_mixture:
        raise InputError(
            f"{merged.path}: `method.merged`: expected one plain tower, got "
            + ("one that routes" if mixture_of(merged).is_routed else "towers of several tasks"),
            "name a merge by a method that writes one tower; a task's own tower in such a file is `PATH#TASK`",
        )
    if merged.is_task_vector:
        raise InputError(f"{merged.path}: is a task vector, a merged tower was expected as `method.merged`")
    check_fit(replace(models, tuned={MERGED: merged}))
    return merged


def _learnt(
    models: Models,
    merged: Checkpoint,
    method: RepresentationSurgery,
    recipe: Recipe,
    progress: Progress | None,
) -> Path:
    """The file of the store with what the method learns on these towers and images."""
    from mergecli.clip.surgery import Surgery

    work = Surgery.of(models, merged, method, recipe)
    folder = home() / KIND / methods.name_of(method)
    path = folder / f"{work.key}.safetensors"
    if not path.exists():
        tensors = work.learn(folder / "tasks", progress)
        used = replace(method, feature_size=tensors[DOWN].shape[2])
        inputs = {**models.digests(), MERGED: merged.digest()}
        write_learnt(path, tensors, used, recipe, models.tuned, inputs, work.looked_at)
    return path


def trace_table(stored: Checkpoint, tasks: tuple[str, ...]) -> Table:
    """A row for each step: the mean loss, and that of each task's batch."""
    from mergecli.clip.surgery import LOSSES

    rows = stored.read(LOSSES).tolist()
    columns = ["step", "loss", *(f"loss {task}" for task in tasks)]
    return Table(
        tuple(Column(name, "number") for name in columns),
        tuple((step, sum(row) / len(row), *row) for step, row in enumerate(rows, 1)),
    )


def _check(stored: Checkpoint, method: RepresentationSurgery, tasks: int) -> None:
    """Raises InputError unless the file's tensors are what its settings say, and numbers."""
    from mergecli.clip.surgery import LOSSES

    shapes = {key: part.shape for key, part in method.extras({}, tasks).items()}
    for key, shape in {**shapes, LOSSES: (method.steps, tasks)}.items():
        entry = stored.entries.get(key)
        if entry is None or entry.shape != shape or entry.dtype != "F32":
            found = "is missing" if entry is None else f"is {entry.dtype} of shape {entry.shape}"
            raise InputError(f"{stored.path}: `{key}` {found}, expected F32 of shape {shape}")
        finite(stored, key, stored.read(key))
