"""Scores: several vision towers on several tasks."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.evaluation.settings import Scores, Settings, Tower
from mergecli.results.result import TaskScore
from mergecli.runtime.errors import UsageError

if TYPE_CHECKING:
    from mergecli.clip.model import Clip
    from mergecli.data.selection import Subject
    from mergecli.data.tasks import Task
    from mergecli.evaluation.counting import Tally
    from mergecli.evaluation.routes import Weights
    from mergecli.runtime.progress import Progress


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
    from mergecli.clip.model import load_clip
    from mergecli.data.images import load_images
    from mergecli.data.selection import subject_of
    from mergecli.data.splits import digest
    from mergecli.evaluation.counting import tallies_of
    from mergecli.evaluation.forward import Seat
    from mergecli.evaluation.routes import Routes, RouteSums
    from mergecli.runtime.distributed import usable_device

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
    from mergecli.formats.mixture import mixture_of

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
    from mergecli.formats.mixture import mixture_of

    return tower.checkpoint.is_mixture and mixture_of(tower.checkpoint).routing("batch") == "batch"


def _score(subject: Subject, tally: Tally, settings: Settings) -> TaskScore:
    from mergecli.data.tasks import digest

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
