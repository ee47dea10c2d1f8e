"""Scores: several vision towers on several tasks."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.evaluation import counting
from mergecli.evaluation.counting import Counts, CountsFile, Job, ModelSlot, load_counts
from mergecli.evaluation.features import (
    LayerFeatures,
    feature_file,
    feature_size,
    features_metadata,
    saved_with,
)
from mergecli.evaluation.plan import PlannedCounts, evaluation_plan
from mergecli.evaluation.routes import Routes, RouteSums
from mergecli.evaluation.settings import Scores, Settings, Tower
from mergecli.formats.mixture import mixture_of
from mergecli.results.plan import Plan
from mergecli.results.result import TaskScore
from mergecli.runtime import interrupts
from mergecli.runtime.dry_run import work_begins
from mergecli.runtime.errors import UsageError
from mergecli.runtime.notes import note
from mergecli.storage.atomic import check_space
from mergecli.storage.cache import cache_path

if TYPE_CHECKING:
    from mergecli.clip.heads import ClipDigests
    from mergecli.clip.model import Clip
    from mergecli.data.images import Images, TaskImages
    from mergecli.data.tasks import Task
    from mergecli.evaluation.routes import Weights
    from mergecli.runtime.progress import Progress
    from mergecli.storage.checkpoint import Checkpoint

CHUNK_BYTES = 1 << 30
"""Bytes of pixels that are in memory while one tower after another sees them, where they are not in the cache yet."""


def score(
    towers: Sequence[Tower],
    folder: Path,
    tasks: Sequence[Task],
    settings: Settings,
    *,
    own_task_only: bool = False,
    predictions: bool = False,
    outputs: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Scores:
    """The score of every tower on every task, with the other parts of the CLIP in `folder`.

    The CLIP is loaded once, each image decoded once, each head made once; only the towers' weights change.

    Args:
        own_task_only: each tower only on the task that has its name.
        predictions: whether one row for each image is wanted.
        outputs: files that the results go to, for the plan of a dry run.

    Raises:
        InputError: a tower or a data set does not fit, which is found before the first image; or an image cannot be read.
    """
    import torch

    from mergecli.clip.heads import check_prompts, clip_digests, has_head
    from mergecli.clip.model import load_clip
    from mergecli.data.images import task_images
    from mergecli.data.splits import sha256_digest
    from mergecli.runtime.distributed import usable_device

    device = usable_device(settings.device)
    clip = load_clip(folder)
    experts = [
        _check(clip, tower, [task for task in tasks if not own_task_only or task.name == tower.name])
        for tower in towers
    ]
    if settings.routes and not any(experts):
        raise UsageError(
            "--routes: none of the checkpoints holds a tower that routes",
            "`weight_ensembling_moe`, `efficient_weight_ensembling_moe` and `smile` make some",
        )
    if settings.routing == "batch" and not any(_routes_batches(tower) for tower in towers):
        raise UsageError(
            "--routing: none of the checkpoints holds a tower that routes batches otherwise than images",
            "`weight_ensembling_moe` and `efficient_weight_ensembling_moe` make some",
        )
    remember = settings.max_size > 0
    every = [task_images(task, settings.split, settings.limit, remember=remember) for task in tasks]
    for each in every:
        for tower in towers:
            if not own_task_only or tower.name == each.task.name:
                _expect_classes(tower, each)
        _tell(each.images)
    clip.model.to(device)
    clip.tower.to(getattr(torch, settings.dtype))
    clip.model.visual_projection.to(getattr(torch, settings.dtype))
    processing = sha256_digest(clip.processor.to_json_string())
    scores = Scores([{} for _ in towers], {}, clip_digests(folder), processing, [])
    for each in every:
        if not has_head(clip, scores.clip.text, each.classes, each.task.templates, settings.max_size):
            check_prompts(clip, each.classes, each.task.templates)
    wanted = [
        (tower, each)
        for each in every
        for tower in towers
        if not own_task_only or tower.name == each.task.name
    ]
    several = len(towers) > 1 and not own_task_only
    _check_space(clip, wanted, settings, several=several)

    def planned() -> Plan:
        counts = [PlannedCounts(*each, _is_counted(clip, *each, settings, scores.clip)) for each in wanted]
        return evaluation_plan(clip, counts, settings, scores.clip, outputs, several=several)

    work_begins(planned)
    weights: list[dict[str, Weights]] = [{} for _ in towers]
    slots = [ModelSlot(clip, settings.routing)]
    pairs = len(tasks) if own_task_only else len(tasks) * len(towers)

    def kept() -> str:
        count = sum(file.exists() for file in scores.unfinished)
        what = "tasks" if pairs == len(tasks) else "tasks of all checkpoints"
        return f"{count} of {pairs} {what} are kept" if count else ""

    with interrupts.telling(kept), torch.inference_mode(), _exact_convolutions(torch.backends.cudnn):
        for of_task in every:
            name = of_task.task.name
            numbers = [n for n, tower in enumerate(towers) if not own_task_only or tower.name == name]
            routes = [RouteSums() if settings.routes and experts[n] else None for n in numbers]
            shown = [towers[n] for n in numbers]
            counted = _counts(slots, shown, of_task, settings, scores, progress, routes)
            for number, counts, sums in zip(numbers, counted, routes, strict=True):
                if sums is not None:
                    weights[number][name] = sums.means()
                scores.tasks[number][name] = _score(of_task, counts, settings)
                if predictions:
                    _add_rows(scores.predictions, towers[number].name, of_task, counts)
    scores.routes += [
        Routes(tower.name, names, each)
        for tower, names, each in zip(towers, experts, weights, strict=True)
        if each
    ]
    return scores


def _check_space(
    clip: Clip, wanted: Sequence[tuple[Tower, TaskImages]], settings: Settings, *, several: bool
) -> None:
    """Raises InputError if the disk has no room for the features."""
    sizes: dict[Path, int] = {}
    for tower, of_task in wanted:
        if file := feature_file(settings.features, tower.name, of_task.task.name, several):
            sizes[file] = feature_size(clip, len(of_task.images))
    check_space(sizes)


def _is_counted(
    clip: Clip, tower: Tower, of_task: TaskImages, settings: Settings, digests: ClipDigests
) -> bool:
    """Whether an evaluation that was interrupted has counted the tower on the task."""
    if not settings.max_size or settings.fresh or settings.features or settings.routes:
        return False
    path = cache_path("results", _key(clip, tower, of_task, settings, digests))
    return load_counts(CountsFile(path, "", settings.max_size), of_task.images.labels) is not None


def _tell(images: Images) -> None:
    """Says in one line what of the data is counted; a warning where images were left out."""
    images.warn()
    if not images.lacks_images:
        note(images.summary)


def _check(clip: Clip, tower: Tower, tasks: Sequence[Task]) -> tuple[str, ...]:
    """The experts of a tower that routes; raises InputError if it does not fit the CLIP, or lacks one of the tasks."""
    from mergecli.clip.model import check_tower

    if not tower.checkpoint.is_mixture:
        check_tower(clip, tower.checkpoint)
        return ()
    mixture = mixture_of(tower.checkpoint)
    check_tower(clip, mixture.shared)
    if mixture.is_routed:
        return mixture.tasks
    for task in tasks:
        mixture.of_task(task.name)
    return ()


def _expect_classes(tower: Tower, of_task: TaskImages) -> None:
    """Raises InputError if a tower has a head for the task that is for other class names or prompts."""
    from mergecli.data.tasks import digest

    if tower.checkpoint.is_mixture:
        digests = {"classes": digest(of_task.classes), "templates": digest(of_task.task.templates)}
        mixture_of(tower.checkpoint).expect_classes(of_task.task.name, digests)


def _routes_batches(tower: Tower) -> bool:
    return tower.checkpoint.is_mixture and mixture_of(tower.checkpoint).routing("batch") == "batch"


def _counts(
    slots: list[ModelSlot],
    towers: Sequence[Tower],
    of_task: TaskImages,
    settings: Settings,
    scores: Scores,
    progress: Progress | None,
    routes: Sequence[RouteSums | None],
) -> list[Counts]:
    """What each tower makes of the task's images: as counted before an interruption, or counted now.

    A tower whose routes are asked for, which is one that has sums in `routes`, is counted now: files of counts hold no routes.
    """
    from mergecli.clip.heads import cached_head
    from mergecli.clip.pixels import Processing, chunks

    clip, task, images = slots[0].clip, of_task.task, of_task.images
    labels = images.labels
    numbers = range(len(labels)) if of_task.numbers is None else of_task.numbers
    with ExitStack() as files:
        jobs: list[Job] = []
        for tower, sums in zip(towers, routes, strict=True):
            key = _key(clip, tower, of_task, settings, scores.clip)
            what = f"an unfinished evaluation: {tower.name} on {task.name}"
            file = CountsFile(cache_path("results", key), what, settings.max_size)
            target = feature_file(settings.features, tower.name, task.name, len(towers) > 1)
            counts = features = None
            if settings.max_size:
                scores.unfinished.append(file.path)
                if not settings.fresh and sums is None and (target is None or saved_with(target, key)):
                    counts = load_counts(file, labels)
            if target and not counts:
                metadata = features_metadata(tower, of_task, key)
                features = files.enter_context(LayerFeatures(clip, target, labels, numbers, metadata))
            counts = counts or Counts()
            jobs.append(Job(tower.checkpoint, task.name, len(labels), file, counts, features, sums))
        missing = [job for job in jobs if not job.counts.labels]
        total = len(jobs) * len(labels)
        done = total - len(missing) * len(labels)

        def tell(more: int) -> None:
            nonlocal done
            done += more
            if progress is not None:
                progress(task.name, done, total)

        if not missing:
            tell(0)
            return [job.counts for job in jobs]
        head = cached_head(clip, of_task.classes, task.templates, scores.clip.text, settings.max_size)
        ahead = 2 if head.device.type != "cpu" else 0  # a processor has no time left for the next batches
        processing = Processing(settings.corruption, settings.workers, settings.max_size, ahead)
        room = CHUNK_BYTES if len(missing) > 1 else 0
        parts = chunks(clip, images, processing, settings.batch_size, room)
        files.callback(parts.close)
        counting.count(slots, missing, head, parts, settings.batch_size, tell)
    return [job.counts for job in jobs]


def _key(clip: Clip, tower: Tower, of_task: TaskImages, settings: Settings, digests: ClipDigests) -> str:
    """32 hex digits of all that the counts depend on."""
    import torch

    from mergecli.storage.metadata import version

    images = of_task.images
    by_label = list(images.names_by_label)
    about = {
        "program": [version(), torch.__version__, clip.device.type, settings.dtype],
        "tower": [tower.checkpoint.digest(), _use_of(tower.checkpoint, of_task, settings)],
        "clip": digests,
        "head": [list(of_task.classes), list(of_task.task.templates)],
        **({} if by_label == list(of_task.classes) else {"labels": by_label}),
        "data": [
            images.fingerprint,
            images.split,
            images.columns,
            None if images.rows is None else list(images.rows),
        ],
        "processor": clip.processor.to_json_string(),
        "corruption": settings.corruption,
        "batch_size": settings.batch_size,
    }
    return sha256(json.dumps(about).encode()).hexdigest()[:32]


def _use_of(checkpoint: Checkpoint, of_task: TaskImages, settings: Settings) -> object:
    """What becomes of a checkpoint's tensors: two towers of the same tensors may be used differently."""
    if not checkpoint.is_mixture:
        return checkpoint.is_task_vector
    facts = ("method", "tasks", "settings_table")
    return [settings.routing, of_task.task.name, *(checkpoint.metadata.get(key) for key in facts)]


def _score(of_task: TaskImages, counts: Counts, settings: Settings) -> TaskScore:
    from mergecli.data.tasks import digest

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
    )


def _add_rows(columns: dict[str, list[object]], tower: str, of_task: TaskImages, counts: Counts) -> None:
    total = len(counts.labels)
    added: Mapping[str, Iterable[object]] = {
        "checkpoint": [tower] * total,
        "task": [of_task.task.name] * total,
        "index": range(total) if of_task.numbers is None else of_task.numbers,
        "label": counts.labels,
        "prediction": counts.chosen,
        "probability": counts.probabilities,
    }
    for name, values in added.items():
        columns.setdefault(name, []).extend(values)


@contextmanager
def _exact_convolutions(settings: Any) -> Generator[None]:
    """Full float32 in convolutions: by default cuDNN rounds their inputs to TF32, and the counts of a GPU would differ."""
    before = settings.allow_tf32
    settings.allow_tf32 = False
    try:
        yield
    finally:
        settings.allow_tf32 = before
