"""Scores: several vision towers on several tasks."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergecli.clip.decoding import Corruption
from mergecli.errors import UsageError, did_you_mean
from mergecli.methods._mixture import Routing
from mergecli.scores import TaskScore

if TYPE_CHECKING:
    from mergecli.checkpoint import Checkpoint
    from mergecli.clip.counting import Tally
    from mergecli.clip.heads import ClipDigests
    from mergecli.clip.model import Clip
    from mergecli.clip.routes import Routes, Weights
    from mergecli.clip.selection import Subject
    from mergecli.clip.tasks import Task
    from mergecli.progress import Progress

ROUTINGS = ("sample", "batch")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """How to evaluate."""

    batch_size: int = 128
    split: str | None = None
    """Another split than each task's own."""
    limit: int | None = None
    """At most so many images of each task, about as many of each class."""
    corruption: Corruption | None = None
    device: str = "cpu"
    dtype: str = "float32"
    """Of the tower's weights and of what it computes; heads and logits are float32 always."""
    workers: int | None = None
    max_size: int = 0
    """Bytes that the cache may grow to; 0 does without it."""
    fresh: bool = False
    """Whether what an interrupted evaluation has counted is counted again."""
    routing: Routing = "sample"
    """How towers that route do so: for each image by itself, or for all images of a batch as one."""
    features: Path | None = None
    """The folder that gets the features of every layer."""
    routes: Path | None = None
    """The folder that gets the routes of towers that route."""

    def __post_init__(self) -> None:
        """Raises UsageError if there is no such dtype or corruption, or a number is none."""
        if self.dtype not in DTYPES:
            near = did_you_mean(self.dtype, DTYPES)
            raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, got `{self.dtype}`{near}")
        if self.routing not in ROUTINGS:
            near = did_you_mean(self.routing, ROUTINGS)
            raise UsageError(f"routing: expected one of {', '.join(ROUTINGS)}, got `{self.routing}`{near}")
        for name in ("batch_size", "limit", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: expected a whole number of at least 1, got {value}")
        if self.corruption is not None:
            from mergecli.clip.corruptions import check

            check(*self.corruption)


class Tower(NamedTuple):
    """A vision tower to evaluate."""

    name: str
    label: str
    """What results call the place it comes from."""
    checkpoint: Checkpoint
    """The vision tower only, open."""


@dataclass
class Scores:
    """What the towers came to."""

    tasks: list[dict[str, TaskScore]]
    """For each tower, task -> score."""
    predictions: dict[str, list[object]]
    """Columns with a row for each tower, task and image, if they are wanted."""
    clip: ClipDigests
    processing: str
    """Digest of the image processor's settings."""
    routes: list[Routes]
    """Of the towers that route, if they are wanted."""
    unfinished: list[Path] = field(default_factory=list[Path])
    """Files of the cache that are of no more use once the results are written."""


def score(
    towers: Sequence[Tower],
    folder: Path,
    tasks: Sequence[Task],
    settings: Settings,
    *,
    own_task_only: bool = False,
    predictions: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """The score of every tower on every task, with the other parts of the CLIP in `folder`.

    The CLIP is loaded once, each image decoded once, each head made once; only the towers' weights change.

    Args:
        own_task_only: each tower only on the task that has its name.
        predictions: whether there is to be a row for each image.

    Raises:
        InputError: a tower or a data set does not fit, found before the first image; or an image cannot be read.
    """
    import torch

    from mergecli.clip.heads import clip_digests
    from mergecli.clip.images import load_images
    from mergecli.clip.model import load_clip
    from mergecli.clip.routes import Routes, RouteSums
    from mergecli.clip.seats import Seat
    from mergecli.clip.selection import subject_of
    from mergecli.clip.splits import digest
    from mergecli.clip.tallies import tallies_of
    from mergecli.devices import usable_device

    place = usable_device(settings.device)
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
    keeps = settings.max_size > 0
    subjects = [
        subject_of(task, load_images(task, settings.split, remember=keeps), settings.limit) for task in tasks
    ]
    clip.model.to(place)
    clip.tower.to(getattr(torch, settings.dtype))
    clip.model.visual_projection.to(getattr(torch, settings.dtype))
    processing = digest(clip.processor.to_json_string())
    scores = Scores([{} for _ in towers], {}, clip_digests(folder), processing, [])
    weights: list[dict[str, Weights]] = [{} for _ in towers]
    seats = [Seat(clip, settings.routing)]
    with torch.inference_mode(), _exact_convolutions(torch.backends.cudnn):
        for subject in subjects:
            name = subject.task.name
            shown = [n for n, tower in enumerate(towers) if not own_task_only or tower.name == name]
            sums = [RouteSums() if settings.routes and experts[n] else None for n in shown]
            tallies = tallies_of(seats, [towers[n] for n in shown], subject, settings, scores, progress, sums)
            for number, tally, routed in zip(shown, tallies, sums, strict=True):
                if routed is not None:
                    weights[number][name] = routed.means()
                scores.tasks[number][name] = _score(subject, tally, settings)
                if predictions:
                    _add_rows(scores.predictions, towers[number].name, subject, tally)
    scores.routes += [
        Routes(tower.name, found, each)
        for tower, found, each in zip(towers, experts, weights, strict=True)
        if each
    ]
    return scores


def _check(clip: Clip, tower: Tower, tasks: Sequence[Task]) -> tuple[str, ...]:
    """The experts of a tower that routes; raises InputError if it does not fit the CLIP, or lacks one of the tasks."""
    from mergecli.clip.model import check_tower
    from mergecli.mixtures import mixture_of

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


def _routes_batches(tower: Tower) -> bool:
    from mergecli.mixtures import mixture_of

    return tower.checkpoint.is_mixture and mixture_of(tower.checkpoint).routing("batch") == "batch"


def _score(subject: Subject, tally: Tally, settings: Settings) -> TaskScore:
    from mergecli.clip.tasks import digest

    total = len(tally.labels)
    return TaskScore(
        accuracy=tally.correct / total,
        loss=tally.loss,
        loss_batch_mean=tally.loss_batch_mean,
        correct=tally.correct,
        images=total,
        split=subject.images.split,
        data={"source": subject.task.data.label, "fingerprint": subject.images.fingerprint},
        classes=digest(subject.classes),
        templates=digest(subject.task.templates),
        limit=settings.limit if subject.numbers is not None else None,
        corruption=settings.corruption.name if settings.corruption else None,
        severity=settings.corruption.severity if settings.corruption else None,
    )


def _add_rows(columns: dict[str, list[object]], tower: str, subject: Subject, tally: Tally) -> None:
    total = len(tally.labels)
    added: Mapping[str, Iterable[object]] = {
        "checkpoint": [tower] * total,
        "task": [subject.task.name] * total,
        "index": range(total) if subject.numbers is None else subject.numbers,
        "label": tally.labels,
        "prediction": tally.chosen,
        "probability": tally.probabilities,
    }
    for name, values in added.items():
        columns.setdefault(name, []).extend(values)


@contextmanager
def _exact_convolutions(settings: Any) -> Generator[None]:
    """Convolutions in float32 as they are elsewhere: by default cuDNN rounds their inputs to TF32."""
    before = settings.allow_tf32
    settings.allow_tf32 = False
    try:
        yield
    finally:
        settings.allow_tf32 = before
