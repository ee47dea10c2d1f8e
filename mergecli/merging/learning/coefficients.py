"""What methods learn as one file: learned now or found in the store by content, checked, applied without images."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli import methods
from mergecli.merging.learning.files import (
    KIND,
    Learned,
    Learning,
    LearningFiles,
    LearningPlan,
    expect,
    finite,
    is_whole,
    json_field,
    read_learned,
    share,
)
from mergecli.merging.learning.needed_files import SETTINGS, TITLES, open_needed
from mergecli.merging.learning.work import LearningWork
from mergecli.merging.merge_target import MergeTarget
from mergecli.merging.models import ModelPasses, Models
from mergecli.methods._adapted import UNSAVED, Adapted
from mergecli.methods._learned import LearnedTensors, Learner, Need, State
from mergecli.methods._task_learner import TaskLearner
from mergecli.recipe.schema import recipe_text
from mergecli.results.cells import Column
from mergecli.results.plan import Work
from mergecli.results.tables import Table
from mergecli.runtime.distributed import are_several, is_first, is_first_here, join, wait
from mergecli.runtime.errors import InputError
from mergecli.runtime.progress import Progress
from mergecli.storage.atomic import check_space
from mergecli.storage.cache import is_stored
from mergecli.storage.checkpoint import Checkpoint, open_checkpoint
from mergecli.storage.metadata import about
from mergecli.storage.safetensors_format import layout_size
from mergecli.storage.store import home

if TYPE_CHECKING:
    from torch import Tensor


def coefficients(models: Models, target: MergeTarget, files: LearningFiles, stack: ExitStack) -> Learning:
    """What the target's method learned, in a file, or has to learn; files stay open until `stack` ends.

    Raises:
        UsageError: a file that the method needs is not named, there are no images for a task, or the file given is of
            another method. InputError: a file is damaged, or is of other models.
    """
    method, recipe = target.method, target.recipe
    assert isinstance(method, Learner)
    needed: dict[Need, Checkpoint] = {}
    if method.needs:
        method, needed = open_needed(models, method, recipe, stack, learns=files.coefficients is None)
        files.refuse_inputs(target, {TITLES[need]: each.files[0] for need, each in needed.items()})
    if isinstance(method, TaskLearner) and not is_first():
        nothing = Learned(replace(target, method=method))
        return Learning(nothing, (), lambda _: nothing)  # the first of several processes learns, and writes
    work, path = None, files.coefficients
    if path is None:
        work = LearningWork.of(models, method, recipe, needed)
        path = _path(work)
        if not is_stored(path):
            check_space({path: layout_size(_layout(work))})
            if _like(path, work) is None:
                work.check()

    def opened() -> Learned:
        named = {SETTINGS[need] for need in method.needs} - method.changeable
        used, stored = read_learned(
            path, method, recipe, models.tuned, stack,
            ours={key: getattr(method, key) for key in (*method.changeable, *method.merge_time) if key in recipe.settings},
            from_file={*named, *(key for key in method.derived if not getattr(method, key))},
        )  # fmt: skip
        merged = needed.get("merged_tower")
        tower = None if merged is None else _reader(merged, models)
        learned, _ = _checked(stored, used, models, tower)
        kept = {TITLES["merged_tower"]: merged} if merged else {}
        facts = {"adapted_on": stored.metadata["adapted_on"]}
        return Learned(replace(target, method=used), learned, {**kept, used.file_title: stored}, facts)

    def learn(progress: Progress | None) -> Learned:
        if work is not None:
            _learn(path, work, progress)
        found = known or opened()
        if is_first():
            assert isinstance(found.target.method, Learner)
            stored = found.files[found.target.method.file_title]
            if files.save_coefficients is not None:
                stored.digest()  # which looks at all of it: a damaged file is not copied
            looked_at = json_field(stored, "adapted_on")
            share(path, trace_table(found.value, found.target.method, looked_at), files)
        return found

    # of several processes, the first of each machine looks later whether the file is whole
    known = opened() if work is None or (is_stored(path) and not are_several()) else None
    if work is None or known:
        assert known is not None
        return Learning(known, list(known.files), learn)
    expected = Learned(replace(target, method=method), about={"adapted_on": json.dumps(work.looked_at)})
    names = [*([TITLES["merged_tower"]] if "merged_tower" in needed else []), method.file_title]
    return Learning(expected, names, learn, partial(_plan, path, work))


def _plan(path: Path, work: LearningWork) -> LearningPlan:
    """What is learned, about how long that takes, and the file of it."""
    from mergecli.merging.learning.expected import expected

    size = layout_size(_layout(work))
    written = Work("write", work.method.file_title, str(path), bytes=size)  # and the trace
    if _like(path, work) is not None:
        return LearningPlan([Work("learn", methods.name_of(work.method), cached=True, seconds=0.0), written])
    found = expected(work, path.parent / "tasks")
    return replace(found, work=[*found.work, written])


def _layout(work: LearningWork) -> dict[str, tuple[str, tuple[int, ...]]]:
    shapes = work.method.file_shapes(len(work.models.tuned), work.models.shapes)
    return {key: ("F32", shape) for key, shape in shapes.items()}


def _path(work: LearningWork) -> Path:
    """The file of the store with what the method learns on these models and images."""
    method = work.method
    others = "".join(f"-{getattr(method, key)}" for key in sorted(method.not_learned_from))
    return _folder(work) / f"{work.key}{others}.safetensors"


def _like(path: Path, work: LearningWork) -> Path | None:
    """A file that differs from the one at `path` only in settings that the learning does not read."""
    return next(iter(sorted(path.parent.glob(f"{work.key}-*.safetensors"))), None)


def _learn(path: Path, work: LearningWork, progress: Progress | None) -> None:
    """Learns what the file at `path` holds, and writes it, unless it is there."""
    if isinstance(work.method, Adapted):
        _adapt(path, work, work.method, progress)
        return
    from mergecli.merging.learning.task_learning import learn_tasks

    if not is_whole(path):
        _write(path, work, learn_tasks(work, path.parent / "tasks", progress))


def _adapt(path: Path, work: LearningWork, method: Adapted, progress: Progress | None) -> None:
    """The same for a method that adapts, in which all processes take part."""
    from mergecli.merging.learning.adaptation_loop import adapt

    models, unfinished = work.models, path.with_name(f"{work.key}.partial.safetensors")
    ranks, device = join(models.device)
    if not ranks.all(is_whole(path), device):
        like = _like(path, work) or path.with_name("none")
        if ranks.all(is_whole(like), device):
            kept = _renewed(like, method, models) if is_first_here() else {}
        else:
            surveyed = method.survey(ModelPasses(models, method.unit, progress if is_first() else None))
            state, trace = adapt(work, method, surveyed, unfinished, progress, ranks, device)
            kept = {**surveyed, **state, **trace}
        if is_first_here() and not path.exists():
            _write(path, work, {key: each for key, each in kept.items() if not key.startswith(UNSAVED)})
        if is_first():
            unfinished.unlink(missing_ok=True)
        wait()


def _folder(work: LearningWork) -> Path:
    return home() / KIND / methods.name_of(work.method)


def _write(path: Path, work: LearningWork, tensors: State) -> None:
    """Writes the file whole or not at all."""
    from mergecli.storage.safetensors_writer import save_tensors

    method, models, recipe = work.method.completed(tensors), work.models, work.recipe
    name, settings = methods.name_of(method), methods.table_of(method, without=method.merge_time)
    metadata = about(
        KIND, method=name, recipe=recipe_text(recipe, name, settings), inputs=work.inputs,
        tasks=json.dumps(list(models.tuned)), settings_table=json.dumps(settings), seed=str(recipe.seed),
        adapted_on=json.dumps(work.looked_at), **({"tensors": json.dumps(models.floats)} if method.lists_tensors else {}),
    )  # fmt: skip
    save_tensors({key: each.contiguous() for key, each in tensors.items()}, path, metadata, checked=True)


def _renewed(path: Path, method: Learner, models: Models) -> State:
    """What the method would learn, taken from a file that differs only in settings that the learning does not read."""
    with open_checkpoint(path, checked=True) as stored:
        _, renewed = _checked(stored, method, models)
        return {key: stored.read(key) for key in stored.entries} | renewed


def trace_table(learned: LearnedTensors, method: Learner, looked_at: Collection[str]) -> Table:
    """A row for each step: the mean loss, the loss of each task that was looked at and, for methods that adapt, each
    task's mean coefficient or what else the method traces.

    Row k has the losses that step k found, which are of the model before it, and the coefficients after it.
    """
    name, key = method.loss
    looked = [index for index, task in enumerate(learned.tasks) if task in looked_at]
    columns = ["step", name, *(f"{name} {learned.tasks[index]}" for index in looked)]
    losses = learned.tensors[key].tolist()
    traced: list[list[float]] = [[] for _ in losses]
    if isinstance(method, Adapted):
        one = method.trace_column
        columns += [one] if one else [f"coefficient {task}" for task in learned.tasks]
        traced = learned.tensors["trace.coefficients"].tolist()
    rows = [
        (step, sum(row[index] for index in looked) / max(len(looked), 1), *(row[index] for index in looked), *own)
        for step, (row, own) in enumerate(zip(losses, traced, strict=True), 1)
    ]  # fmt: skip
    return Table(tuple(Column(each, "number") for each in columns), tuple(rows))


def _checked(
    stored: Checkpoint,
    method: Learner,
    models: Models,
    tower: Callable[[str, int, int], Tensor] | None = None,
) -> tuple[LearnedTensors, State]:
    """What the file holds, once it is known that nothing is missing; and those of its tensors that had to be made again
    for the method's settings."""
    names = list(models.floats)
    if method.lists_tensors:
        names = [str(name) for name in json_field(stored, "tensors")]
        if set(names) != set(models.floats):
            raise InputError(f"{stored.path}: is for models with other tensors")
    shapes = {each: models.reference.entries[each].shape for each in names}
    expect(stored, method.file_shapes(len(models.tuned), shapes))
    held = {
        key: finite(stored, key, stored.read(key))
        for key in stored.entries
        if not key.startswith(method.streamed)
    }
    seed, tasks = json_field(stored, "seed"), tuple(models.tuned)
    learned = LearnedTensors(tasks, tuple(names), shapes, held, seed, _reader(stored, models), tower)
    before = json_field(stored, "settings_table")
    if all(getattr(method, key) == before.get(key) for key in method.changeable):
        return learned, {}
    renewed = method.renewed(learned, shapes)
    return replace(learned, tensors=held | renewed), renewed


def _reader(stored: Checkpoint, models: Models) -> Callable[[str, int, int], Tensor]:
    """Reads float32 entries of a tensor to the device, known to be finite."""

    def read(key: str, start: int, stop: int) -> Tensor:
        return finite(stored, key, stored.read_entries(key, start, stop).float()).to(models.device)

    return read
