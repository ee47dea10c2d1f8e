"""Statistics that methods measure on images: safetensors files, one a task, found again by content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.formats.opening import model_path
from mergecli.formats.projection import projection_metadata
from mergecli.hub.fetched import expect_all
from mergecli.merging.learning.calibration import CalibrationTask, calibration_task, task_of
from mergecli.merging.learning.files import Learned, Learning, LearningFiles, LearningPlan, is_whole
from mergecli.merging.merge_target import MergeTarget
from mergecli.merging.models import Models
from mergecli.methods._base import Method
from mergecli.methods._calibrated import Calibrated, measured_by
from mergecli.methods._sim import FindsTask
from mergecli.recipe.schema import Recipe
from mergecli.results.plan import Work
from mergecli.runtime import interrupts
from mergecli.runtime.distributed import is_first, join, wait
from mergecli.runtime.dry_run import is_dry
from mergecli.runtime.errors import InputError, UsageError, listed, toml_text
from mergecli.storage.atomic import check_space
from mergecli.storage.cache import is_stored
from mergecli.storage.checkpoint import PROJECTION, Checkpoint, open_checkpoint
from mergecli.storage.differences import Form, differences
from mergecli.storage.metadata import about, table_differences
from mergecli.storage.safetensors_format import layout_size
from mergecli.storage.store import home

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.merging.learning.probe import StatisticsRun
    from mergecli.runtime.progress import Progress

KIND = "statistics"
"""The `kind` in the metadata of the files."""
_CURE = "delete it, then it is measured again"


@dataclass(frozen=True)
class StoredStatistics:
    """Statistics in files, which a merge reads piece by piece."""

    checkpoints: tuple[Checkpoint, ...]
    device: str
    """Where the merge wants them."""

    @property
    def names(self) -> Collection[str]:
        """The names of a file's tensors."""
        return self.checkpoints[0].entries.keys()

    def read(self, file: int, name: str, start: int = 0, stop: int | None = None, /) -> Tensor:
        """(stop - start,) entries of a flattened tensor of file number `file`."""
        stored = self.checkpoints[file]
        values = stored.read_entries(name, start, stored.entries[name].size if stop is None else stop)
        if not math.isfinite(float(values.sum())) and not bool(values.isfinite().all()):
            raise InputError(
                f"{stored.path}: is damaged: `{name}` has NaN or infinity",
                _CURE,
            )
        return values.to(self.device)


@dataclass(frozen=True)
class StatisticsFile:
    """One file of statistics: what it is measured on, and by which settings."""

    name: str
    path: Path
    tasks: tuple[CalibrationTask, ...]
    inputs: Mapping[str, str]
    """Model -> digest."""
    measured: Mapping[str, Any]
    """Method, settings and images."""

    @property
    def key(self) -> str:
        """32 hex digits of all that the file depends on."""
        return hashlib.sha256(json.dumps([self.inputs, self.measured]).encode()).hexdigest()[:32]

    def metadata(self) -> dict[str, str]:
        """The file's metadata."""
        method = str(self.measured["method"])
        return about(KIND, method=method, inputs=self.inputs, measured=json.dumps(self.measured))


def statistics(models: Models, target: MergeTarget, files: LearningFiles, stack: ExitStack) -> Learning:
    """The statistics of these models, open until `stack` ends; those that no file holds yet are to be measured.

    Raises:
        InputError: the images are missing; or a file is damaged, or was measured on something else.
    """
    recipe = target.recipe
    target = replace(target, method=fitted(target.method, recipe))
    method = measured_by(target.method)
    assert method is not None
    wanted = files_for(models, method, recipe, files.statistics)
    measurement = Measurement.of(wanted, models, method, recipe)

    def opened() -> Learned:
        found = {
            f"statistics of {each.name}": stack.enter_context(_opened(each, models, method))
            for each in wanted
        }
        facts = _facts(json.loads(each.metadata["measured"]) for each in found.values())
        stored = StoredStatistics(tuple(found.values()), models.device)
        return Learned(target, stored, found, {"measured": json.dumps(facts)})

    def learned(progress: Progress | None) -> Learned:
        measurement.measure(progress)
        return opened()

    is_known = is_dry() and not measurement.missing
    expected = Learned(target, about={"measured": json.dumps(_facts([each.measured for each in wanted]))})
    names = [f"statistics of {each.name}" for each in wanted]
    return Learning(opened() if is_known else expected, names, learned, measurement.plan)


def fitted(method: Method, recipe: Recipe) -> Method:
    """The method with the setting that only the base knows.

    Raises:
        UsageError: the recipe gives it another value.
    """
    if not isinstance(method, FindsTask) or not method.router or recipe.base is None:
        return method
    with open_checkpoint(model_path(recipe.base)) as stored:
        projection = stored.entries.get(PROJECTION)
    if projection is None:  # of a tower alone, with which nothing can be measured
        return method
    size = projection.shape[0]
    if method.feature_size not in (None, size):
        raise UsageError(f"`method.feature_size`: is {method.feature_size}, the base's features have {size}")
    return replace(method, feature_size=size)


def _facts(measured: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Task -> what its images are, from what the files say that they were measured on."""
    return {task: facts for each in measured for task, facts in each["tasks"].items()}


def files_for(
    models: Models, method: Calibrated, recipe: Recipe, folder: Path | None
) -> list[StatisticsFile]:
    """The files that a merge needs, whether they exist or not.

    Args:
        folder: where they are, or will be; by default the store, where they are found by content.
    """
    from mergecli.clip.heads import surroundings

    assert recipe.base is not None
    assert models.base is not None
    name = method.measured_as or methods.name_of(method)
    settings = methods.table_of(method, without=method.merge_time)
    if method.shuffle:
        settings["seed"] = recipe.seed
    common: dict[str, Any] = {"method": name, "settings": settings, **projection_metadata(models.base)}
    common["clip"] = surroundings(model_path(recipe.base), head=method.needs_head)
    found: list[StatisticsFile] = []
    if folder is None:
        expect_all([], recipe, [task_of(name, recipe) for name in models.tuned])
    for tasks in [tuple(models.tuned)] if method.joint else [(task,) for task in models.tuned]:
        title = name if method.joint else tasks[0]
        path = folder / f"{title}.safetensors" if folder else None
        may_lack = path is not None and is_stored(path)
        looked = tuple(
            calibration_task(task, method.split, recipe, may_lack_images=may_lack) for task in tasks
        )
        facts = {each.name: each.facts(head=method.needs_head, most=method.examples) for each in looked}
        inputs = {"base": models.base.digest()}
        inputs |= {} if method.of_base else {task: models.tuned[task].digest() for task in tasks}
        measured = common | {"tasks": facts}
        each = StatisticsFile(title, path or Path(), looked, inputs, measured)
        found.append(each if path else replace(each, path=home() / KIND / name / f"{each.key}.safetensors"))
    return found


@dataclass(frozen=True)
class Measurement:
    """The files of statistics that are still missing, and what measures them."""

    missing: Sequence[StatisticsFile]
    own: Sequence[StatisticsFile]
    """Those that this process measures: several processes share them, each measures some of them whole."""
    new_run: Callable[[], StatisticsRun]
    kept: Callable[[], str]
    """What is kept after an interruption."""

    @classmethod
    def of(
        cls, files: Sequence[StatisticsFile], models: Models, method: Calibrated, recipe: Recipe
    ) -> Measurement:
        """Checks the files that exist, and whether those that do not can be measured.

        Raises:
            InputError: a file is damaged or of something else; or models, prompts or the space do not suffice for the others.
        """
        ranks, device = join(models.device)
        missing = [each for each in files if not ranks.all(is_whole(each.path), device)]
        for each in files:
            if each not in missing:
                _opened(each, models, method).close()
        size = layout_size(method.layout(models.shapes)) if missing else 0
        check_space({each.path: size for each in missing})
        wait()  # nobody writes before all have looked
        own = missing[ranks.own :: ranks.count]
        tasks = [one for each in own for one in each.tasks]
        if own:
            from mergecli.merging.learning.probe import fitting_clip

            fitting_clip(method, models, recipe, tasks)  # and dropped: many merges may wait for their turn

        def new_run() -> StatisticsRun:
            from mergecli.merging.learning.probe import StatisticsRun

            return StatisticsRun(method, replace(models, device=device), recipe, tasks)

        return cls(missing, own, new_run, partial(_kept, files))

    def measure(self, progress: Progress | None) -> tuple[str, ...]:
        """Measures what is missing, and returns its names; all processes wait for the last."""
        if self.own:
            run = self.new_run()
            with interrupts.telling(self.kept):
                for each in self.own:
                    run.write(each.path, each.tasks, each.metadata(), progress if is_first() else None)
        wait()
        if lost := [each.path for each in self.missing if not each.path.exists()]:
            raise InputError(
                f"{lost[0]}: was measured by another process, and is not here",
                "name a folder that all machines see, or copy the files",
            )
        return tuple(each.name for each in self.missing)

    def plan(self) -> LearningPlan:
        """How many images are looked at, and about how long that takes."""
        if not self.own:
            return LearningPlan()
        work: list[Work] = []
        run = self.new_run()
        for each in self.own:
            seconds = run.expected_seconds(each.tasks)
            work.append(Work("measure", each.name, images=run.images(each.tasks), seconds=seconds))
            size, name = layout_size(run.layout), f"statistics of {each.name}"
            work.append(Work("write", name, str(each.path), tensors=len(run.layout), bytes=size))
        return LearningPlan(work)


def _kept(files: Sequence[StatisticsFile]) -> str:
    count = sum(each.path.exists() for each in files)
    return f"{count} of {len(files)} files of statistics are kept" if count else ""


def _opened(file: StatisticsFile, models: Models, method: Calibrated) -> Checkpoint:
    """The file, known to be whole and measured on these models and images with these settings."""
    stored = open_checkpoint(file.path, cure=_CURE)
    try:
        _check(stored, file, models, method)
    except BaseException:
        stored.close()
        raise
    return stored


def _check(stored: Checkpoint, file: StatisticsFile, models: Models, method: Calibrated) -> None:
    if stored.metadata.get("kind") != KIND:
        raise InputError(f"{file.path}: are no statistics", "name a folder of its own for statistics")
    stored.expect_checksums(_CURE)
    try:
        found = {key: json.loads(stored.metadata[key]) for key in ("inputs", "measured")}
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{file.path}: does not say what it was measured on", "delete it") from error
    wanted = json.loads(json.dumps({"inputs": file.inputs, "measured": file.measured}))
    wrong = [
        f"`{key}`: expected {toml_text(after)}, got {'nothing' if before is None else toml_text(before)}"
        for key, before, after in table_differences(found, wanted, only_new=True)
    ]
    layout = {name: Form(shape, dtype) for name, (dtype, shape) in method.layout(models.shapes).items()}
    if wrong := wrong or differences(stored.entries, layout):
        raise InputError(
            f"{file.path}: is of another measurement than this merge needs:\n{listed(wrong)}",
            "name another folder, or delete the file: then it is measured again",
        )
