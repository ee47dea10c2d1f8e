"""Scoring: towers on tasks, cut into units, each counted once and kept as a file; and the scores that the files hold."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergecli import methods
from mergecli.evaluation import counting
from mergecli.evaluation.counting import Counts, Job, ModelSlot, counts_file, read_counts
from mergecli.evaluation.facts import TowerFacts
from mergecli.evaluation.features import (
    LayerFeatures,
    feature_file,
    feature_size,
    features_metadata,
    saved_with,
)
from mergecli.evaluation.plan import PlannedCounts, evaluation_plan
from mergecli.evaluation.routes import RouteSums, Weights
from mergecli.evaluation.settings import Settings, Tower
from mergecli.formats.mixture import mixture_of
from mergecli.formats.opening import model_path, open_source
from mergecli.methods._mixture import Routed
from mergecli.methods._sim import FindsTask
from mergecli.results.result import Evaluation, TaskScore
from mergecli.runtime.engines.contract import Unit
from mergecli.runtime.errors import UsageError, quoted
from mergecli.runtime.notes import note
from mergecli.storage.atomic import check_space

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.data.images import Images, TaskImages
    from mergecli.data.tasks import Task
    from mergecli.results.plan import Plan
    from mergecli.runtime.progress import Progress
    from mergecli.storage.checkpoint import Checkpoint
    from mergecli.storage.sources import Source
    from mergecli.storage.units import UnitFiles

CHUNK_BYTES = 1 << 30
"""Bytes of pixels that are in memory while one tower after another sees them, where they are not in the cache yet."""


class Counted(NamedTuple):
    """What the file of a unit holds."""

    counts: Counts
    facts: TowerFacts
    routes: Weights | None
    task_found: float | None
    """The share of the images whose task the tower found, if it looks for it and knows it."""


@dataclass
class Scores:
    """The scores of one tower, and what is reported besides."""

    tasks: dict[str, TaskScore] = field(default_factory=dict[str, TaskScore])
    """Task -> score."""
    facts: TowerFacts | None = None
    """None where there are no scores."""
    predictions: dict[str, Mapping[str, Sequence[object]]] = field(
        default_factory=dict[str, "Mapping[str, Sequence[object]]"]
    )
    """Task -> columns with one row for each image, if they are wanted."""
    routes: dict[str, Weights] = field(default_factory=dict[str, Weights])
    """Task -> routes, of a tower that routes, if they are wanted."""
    missing: list[str] = field(default_factory=list[str])
    """Tasks that nobody has counted."""


class Scoring:
    """The CLIP that towers are counted with, and the images of tasks: made once, for one unit or for many."""

    def __init__(self, base: Source, settings: Settings) -> None:
        """Args:
        base: the CLIP whose other parts are used.
        """
        from mergecli.clip.heads import clip_digests
        from mergecli.clip.model import load_clip
        from mergecli.data.splits import sha256_digest

        folder = model_path(base)
        self.base, self.settings = base, settings
        self.clip = load_clip(folder)
        self.digests = clip_digests(folder)
        self.processing = sha256_digest(self.clip.processor.to_json_string())
        self._images: dict[str, TaskImages] = {}
        with open_source(base) as whole:
            self.tower_bytes = whole.vision().nbytes
            """Bytes of the CLIP's own vision tower, as it is stored."""
            self.encoder_bytes = whole.encoder().nbytes
            """The same with its visual projection."""

    def on(self, split: str | None) -> Scoring:
        """The same on another split, with the same CLIP."""
        return self.with_limit(self.settings.limit, split)

    def with_limit(self, limit: int | None, split: str | None) -> Scoring:
        """The same on so many images of each task of a split; itself where it is that already."""
        if (limit, split) == (self.settings.limit, self.settings.split):
            return self
        other = copy.copy(self)
        other.settings, other._images = replace(self.settings, split=split, limit=limit), {}
        return other

    def check(self, tower: Tower, tasks: Iterable[str]) -> tuple[str, ...]:
        """The experts of a tower that routes; raises InputError if it does not fit the CLIP, or lacks one of the tasks."""
        from mergecli.clip.model import check_tower

        if not tower.checkpoint.is_mixture:
            check_tower(self.clip, tower.checkpoint)
            return ()
        mixture = mixture_of(tower.checkpoint)
        check_tower(self.clip, mixture.shared)
        if mixture.is_routed:
            self.clip.expect_clip("towers that route are evaluated with CLIPs only")
            return mixture.tasks
        for task in tasks:
            mixture.of_task(task)
        return ()

    def check_heads(self, tower: Tower, tasks: Iterable[TaskImages]) -> None:
        """Raises InputError if a tower has a head for a task that is for other class names or prompts than the task's."""
        from mergecli.data.tasks import digest

        if not tower.checkpoint.is_mixture or not (mixture := mixture_of(tower.checkpoint)).has_heads:
            return
        for each in tasks:
            digests = {"classes": digest(each.classes), "templates": digest(each.task.templates)}
            mixture.expect_classes(each.task.name, digests)

    def check_routing(self, towers: Sequence[Tower], experts: Iterable[tuple[str, ...]]) -> None:
        """Raises UsageError if routes are asked for, or batches are to be routed alike, and no tower does so."""
        if self.settings.routes and not any(experts):
            raise UsageError(
                "--routes: none of the checkpoints holds a tower that routes",
                f"{_makers(lambda kind: kind.kind == Routed.kind)}; and with `method.router=sim` {_that_find_tasks()}",
            )
        if self.settings.features and (found := [each.name for each in towers if _sends_on(each)]):
            raise UsageError(
                f"--features: {quoted(found)}: each image goes through the tower of the task that is found for it",
                "name the tower of one task: `FILE#TASK`",
            )
        if self.settings.routing == "batch" and not any(_routes_batches(tower) for tower in towers):
            raise UsageError(
                "--routing: none of the checkpoints holds a tower that routes batches otherwise than images",
                _makers(lambda kind: kind.routes_batches),
            )

    def images(self, task: Task) -> TaskImages:
        """The images of a task that are looked at.

        Raises:
            InputError: the data are missing or do not fit.
        """
        from mergecli.data.images import task_images

        if task.name not in self._images:
            remember = self.settings.max_size > 0
            self._images[task.name] = task_images(
                task, self.settings.split, self.settings.limit, remember=remember
            )
        return self._images[task.name]

    def check_prompts(self, of_task: TaskImages) -> None:
        """Raises InputError if a prompt of a task is too long, unless its head is kept and no prompt is read."""
        from mergecli.clip.heads import check_prompts, has_head

        of = of_task.classes, of_task.task.templates
        if not has_head(self.clip, self.digests.text, *of, self.settings.max_size):
            check_prompts(self.clip, *of)

    def check_features(self, pairs: Iterable[tuple[str, TaskImages]], *, several: bool) -> None:
        """Raises InputError if the disk has no room for the features of these towers on these tasks."""
        if self.settings.features:
            self.clip.expect_clip("`--features` saves class tokens, which other towers may not have")
        sizes: dict[Path, int] = {}
        for tower, of_task in pairs:
            if file := feature_file(self.settings.features, tower, of_task.task.name, several):
                sizes[file] = feature_size(self.clip, len(of_task.images))
        check_space(sizes)

    def plan(self, counts: Sequence[PlannedCounts], outputs: Sequence[Path], *, several: bool) -> Plan:
        """The plan of counts of towers on tasks."""
        _ = self._slots  # puts the CLIP where it computes
        return evaluation_plan(self.clip, counts, self.settings, self.digests, outputs, several=several)

    def unit(self, of_task: TaskImages, name: str, identity: object) -> Unit:
        """A tower on a task; the `identity` tells the tower from others."""
        return Unit((name, of_task.task.name), self._key(of_task, identity))

    def unit_of(self, of_task: TaskImages, tower: Tower) -> Unit:
        """The unit of an open tower."""
        identity = tower.identity or [
            tower.checkpoint.digest(),
            _use_of(tower.checkpoint, of_task, self.settings),
        ]
        return self.unit(of_task, tower.name, identity)

    def _key(self, of_task: TaskImages, identity: object) -> str:
        """32 hex digits of all that the counts depend on."""
        import torch

        from mergecli.storage.metadata import version

        images, settings = of_task.images, self.settings
        by_label = list(images.names_by_label)
        about = {
            "program": [version(), torch.__version__, torch.device(settings.device).type, settings.dtype],
            "tower": identity,
            "clip": self.digests,
            **({} if self.clip.is_clip else {"layers": self.clip.computed_by}),
            "head": [list(of_task.classes), list(of_task.task.templates)],
            **({} if by_label == list(of_task.classes) else {"labels": by_label}),
            "data": [
                images.fingerprint,
                images.split,
                images.columns,
                None if images.rows is None else list(images.rows),
            ],
            "processor": self.clip.processor.to_json_string(),
            "corruption": settings.corruption,
            "batch_size": settings.batch_size,
            **({"routes": True} if settings.routes else {}),
            **({"logits": True} if settings.logits else {}),
        }
        return sha256(json.dumps(about).encode()).hexdigest()[:32]

    def read(self, unit: Unit, of_task: TaskImages, files: UnitFiles, *, several: bool) -> Counted | None:
        """What the unit's file holds; None if it is to be done."""
        features = feature_file(self.settings.features, unit.of[0], unit.of[1], several)
        if features is not None and not saved_with(features, unit.key):
            return None
        labels = of_task.images.labels

        def read(stored: Checkpoint) -> Counted | None:
            counts = read_counts(stored, labels)
            facts = TowerFacts.of_json(json.loads(stored.metadata["tower"]))
            routes, found = (json.loads(stored.metadata.get(key, "null")) for key in ("routes", "task_found"))
            return Counted(counts, facts, routes, found) if counts is not None else None

        return files.read(unit, read)

    def count(
        self,
        of_task: TaskImages,
        units: Sequence[tuple[Unit, Tower]],
        save: Callable[[Unit, bytes, float], None],
        *,
        several: bool,
        done: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Counts towers on one task, several at once on a processor; each image is decoded once.

        Args:
            save: gets a unit's file and the seconds that it took.
            several: whether the evaluation is of several towers, whose features have a folder each.
            done: units of the task that are counted already.
        """
        import torch

        with torch.inference_mode(), _exact_convolutions(torch.backends.cudnn):
            self._count(of_task, units, save, several, done, progress)

    def _count(
        self,
        of_task: TaskImages,
        units: Sequence[tuple[Unit, Tower]],
        save: Callable[[Unit, bytes, float], None],
        several: bool,
        done_units: int,
        progress: Progress | None,
    ) -> None:
        from mergecli.clip.heads import cached_head
        from mergecli.clip.pixels import Processing, chunks

        settings, task, images = self.settings, of_task.task, of_task.images
        labels = images.labels
        numbers = range(len(labels)) if of_task.numbers is None else of_task.numbers
        total, done = (len(units) + done_units) * len(labels), done_units * len(labels)

        def tell(more: int) -> None:
            nonlocal done
            done += more
            if progress is not None:
                progress(task.name, done, total)

        if not units:
            tell(0)
            return
        with ExitStack() as files:
            jobs: list[Job] = []
            for unit, tower in units:
                jobs.append(self._job(of_task, unit, tower, save))
                if target := feature_file(settings.features, tower.name, task.name, several):
                    metadata = features_metadata(tower, of_task, unit.key)
                    features = LayerFeatures(self.clip, target, labels, numbers, metadata)
                    jobs[-1].features = files.enter_context(features)
            slots = self._slots
            head = cached_head(
                self.clip, of_task.classes, task.templates, self.digests.text, settings.max_size
            )
            ahead = 2 if head.device.type != "cpu" else 0  # a processor has no time left for the next batches
            processing = Processing(settings.corruption, settings.workers, settings.max_size, ahead)
            room = CHUNK_BYTES if len(jobs) > 1 else 0
            parts = chunks(self.clip, images, processing, settings.batch_size, room)
            files.callback(parts.close)
            counting.count(slots, jobs, head, parts, settings.batch_size, tell)

    def _job(
        self, of_task: TaskImages, unit: Unit, tower: Tower, save: Callable[[Unit, bytes, float], None]
    ) -> Job:
        routes = RouteSums() if self.settings.routes and _routes_images(tower) else None

        def write(job: Job) -> None:
            facts = TowerFacts.of(tower, self.digests.vision, self.settings)
            metadata = {
                "what": f"an unfinished evaluation: {unit.name}",
                "key": unit.key,
                "tower": json.dumps(facts.to_json()),
                **({"routes": json.dumps(routes.means())} if routes else {}),
                **(
                    {"task_found": json.dumps(share)}
                    if (share := _task_found(tower, job)) is not None
                    else {}
                ),
            }
            save(unit, counts_file(job.counts, metadata, job.logits), job.seconds)

        name = of_task.task.name
        logits: list[Tensor] | None = [] if self.settings.logits else None
        return Job(tower.checkpoint, name, len(of_task.images), write, routes=routes, logits=logits)

    @cached_property
    def _slots(self) -> list[ModelSlot]:
        """Slots for towers, where the evaluation computes; `count` adds to them."""
        import torch

        from mergecli.runtime.distributed import usable_device

        clip, dtype = self.clip, getattr(torch, self.settings.dtype)
        clip.model.to(usable_device(self.settings.device))
        for part in clip.model.children():  # the tower and its projection; the logit scale stays as it is
            part.to(dtype)
        return [ModelSlot(clip, self.settings.routing)]


def tell(images: Images) -> None:
    """Says in one line what of the data is counted; a warning where images were left out."""
    images.warn()
    if not images.lacks_images:
        note(images.summary)


def add(scores: Scores, of_task: TaskImages, found: Counted, settings: Settings, name: str = "") -> None:
    """Adds what a unit's file holds to the scores of its tower; with the tower's `name`, its predictions too."""
    task = of_task.task.name
    scores.facts = scores.facts or found.facts
    scores.tasks[task] = _score(of_task, found, settings)
    if found.routes is not None:
        scores.routes[task] = found.routes
    if name:
        scores.predictions[task] = _rows(name, of_task, found.counts)


def evaluation_of(facts: TowerFacts, tasks: Mapping[str, TaskScore], scoring: Scoring) -> Evaluation:
    """The result of a tower, of what is known of it and its scores."""
    digests, settings = scoring.digests, scoring.settings
    own = scoring.encoder_bytes if facts.has_projection else scoring.tower_bytes
    return Evaluation(
        clip={
            "path": scoring.base.label, "digest": digests.vision, "text": digests.text, "rest": digests.rest,
            "processing": scoring.processing,
        },
        batch_size=settings.batch_size,
        dtype=settings.dtype,
        device=settings.device.partition(":")[0],
        checkpoint=facts.checkpoint,
        parameters=facts.parameters,
        tasks=tasks,
        bytes=facts.bytes,
        relative_size=facts.bytes / own,
        models=facts.models,
        recipe_pool=facts.pool,
        looked_at=facts.looked_at,
    )  # fmt: skip


def _makers(fits: Callable[[type[Routed]], bool]) -> str:
    """A hint that names the methods whose towers route, as far as they fit."""
    kinds = ((name, methods.find(name)) for name in methods.names())
    found = [name for name, kind in kinds if issubclass(kind, Routed) and fits(kind)]
    return f"methods that make some: {quoted(found, len(found))}"


def _that_find_tasks() -> str:
    return quoted(name for name in methods.names() if issubclass(methods.find(name), FindsTask))


def _task_found(tower: Tower, job: Job) -> float | None:
    """The share of the job's images whose task the tower found; None if it did not look for it, or does not know it."""
    tasks = mixture_of(tower.checkpoint).tasks if job.tasks else ()
    return job.tasks.count(tasks.index(job.task)) / len(job.tasks) if job.task in tasks else None


def _sends_on(tower: Tower) -> bool:
    return tower.checkpoint.is_mixture and mixture_of(tower.checkpoint).sends_on


def _routes_images(tower: Tower) -> bool:
    return tower.checkpoint.is_mixture and mixture_of(tower.checkpoint).is_routed


def _routes_batches(tower: Tower) -> bool:
    return tower.checkpoint.is_mixture and mixture_of(tower.checkpoint).routing("batch") == "batch"


def _use_of(checkpoint: Checkpoint, of_task: TaskImages, settings: Settings) -> object:
    """What becomes of a checkpoint's tensors: two towers of the same tensors may be used differently."""
    if not checkpoint.is_mixture:
        return checkpoint.is_task_vector
    facts = ("method", "tasks", "settings_table")
    return [settings.routing, of_task.task.name, *(checkpoint.metadata.get(key) for key in facts)]


def _score(of_task: TaskImages, counted: Counted, settings: Settings) -> TaskScore:
    from mergecli.data.tasks import digest

    counts = counted.counts
    total = len(counts.labels)
    return TaskScore(
        accuracy=counts.correct / total,
        loss=counts.loss,
        loss_batch_mean=counts.loss_batch_mean,
        correct=counts.correct,
        images=total,
        split=of_task.images.split,
        data={"source": of_task.task.data.label, "fingerprint": of_task.images.fingerprint},
        classes=digest(of_task.images.names_by_label),
        templates=digest(of_task.task.templates),
        limit=settings.limit if of_task.numbers is not None else None,
        corruption=settings.corruption.name if settings.corruption else None,
        severity=settings.corruption.severity if settings.corruption else None,
        task_found=counted.task_found,
    )


def _rows(tower: str, of_task: TaskImages, counts: Counts) -> dict[str, Sequence[object]]:
    """Columns with a row for each image."""
    total = len(counts.labels)
    return {
        "checkpoint": [tower] * total,
        "task": [of_task.task.name] * total,
        "index": range(total) if of_task.numbers is None else of_task.numbers,
        "label": counts.labels,
        "prediction": counts.chosen,
        "probability": counts.probabilities,
    }


@contextmanager
def _exact_convolutions(settings: Any) -> Generator[None]:
    """Full float32 in convolutions: by default cuDNN rounds their inputs to TF32, and the counts of a GPU would differ."""
    before = settings.allow_tf32
    settings.allow_tf32 = False
    try:
        yield
    finally:
        settings.allow_tf32 = before
