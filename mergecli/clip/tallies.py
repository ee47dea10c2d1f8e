"""Tallies: as an interrupted evaluation counted them, or counted now and kept until the evaluation is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from hashlib import sha256
from typing import TYPE_CHECKING

from mergecli import caching
from mergecli.errors import InputError

if TYPE_CHECKING:
    from mergecli.checkpoint import Checkpoint
    from mergecli.clip.counting import Tally
    from mergecli.clip.heads import ClipDigests
    from mergecli.clip.model import Clip
    from mergecli.clip.routes import RouteSums
    from mergecli.clip.scoring import Scores, Settings, Tower
    from mergecli.clip.seats import Seat
    from mergecli.clip.selection import Subject
    from mergecli.progress import Progress

PIXEL_BYTES = 1 << 30
"""Of images that are not in the cache yet, so many bytes are held in memory while the towers take turns."""


def tallies_of(
    seats: list[Seat],
    towers: Sequence[Tower],
    subject: Subject,
    settings: Settings,
    scores: Scores,
    progress: Progress | None,
    routes: Sequence[RouteSums | None],
) -> list[Tally]:
    """What each tower gets on the task: as counted before an interruption, or counted now.

    A tower whose routes are asked for, by its place in `routes`, is counted now: tallies keep no routes.
    """
    from mergecli.clip.counting import Round, count, keep, kept
    from mergecli.clip.features import LayerFeatures, feature_file, saved_with
    from mergecli.clip.heads import cached_head
    from mergecli.clip.pixels import Processing, spans

    clip, name, images = seats[0].clip, subject.task.name, subject.images
    keys = [_key(clip, tower, subject, settings, scores.clip) for tower in towers]
    places = [caching.place("results", key) for key in keys]
    targets = [feature_file(settings.features, tower.name, name, len(towers) > 1) for tower in towers]
    labels = images.labels
    found: list[Tally | None] = [None for _ in towers]
    if settings.max_size:
        scores.unfinished += places
        for number, (key, place, target) in enumerate(zip(keys, places, targets, strict=True)):
            if not settings.fresh and routes[number] is None and (target is None or saved_with(target, key)):
                found[number] = kept(place, labels)
    done = len(labels) * sum(each is not None for each in found)
    missing = [number for number, each in enumerate(found) if each is None]

    def tell(position: int, tally: Tally, more: int) -> None:
        nonlocal done
        done += more
        number = missing[position]
        if len(tally.labels) == len(labels) and caching.make_room(40 * len(labels), settings.max_size):
            with suppress(InputError):
                keep(tally, places[number], f"an unfinished evaluation: {towers[number].name} on {name}")
        if progress is not None:
            progress(name, done, len(labels) * len(towers))

    if missing:
        head = cached_head(clip, subject.classes, subject.task.templates, scores.clip.text, settings.max_size)
        processing = Processing(
            settings.corruption, settings.workers, settings.max_size, 2 if head.device.type != "cpu" else 0
        )
        room = PIXEL_BYTES if len(missing) > 1 else 0
        numbers = range(len(labels)) if subject.numbers is None else subject.numbers
        with ExitStack() as files:
            writers = [
                files.enter_context(
                    LayerFeatures(clip, target, labels, numbers, _feature_facts(towers[n], subject, keys[n]))
                )
                if (target := targets[n])
                else None
                for n in missing
            ]
            parts = spans(clip, images, processing, settings.batch_size, room)
            files.callback(parts.close)
            checkpoints = [towers[n].checkpoint for n in missing]
            work = Round(
                checkpoints, head, settings.batch_size, name, writers, tell, [routes[n] for n in missing]
            )
            counted = count(seats, work, parts)
        for number, tally in zip(missing, counted, strict=True):
            found[number] = tally
    elif progress is not None:
        progress(name, done, done)
    return [tally for tally in found if tally is not None]


def _key(clip: Clip, tower: Tower, subject: Subject, settings: Settings, digests: ClipDigests) -> str:
    """32 hex digits of all that a tally depends on."""
    import torch

    from mergecli.provenance import version

    images = subject.images
    about = {
        "program": [version(), torch.__version__, clip.device.type, settings.dtype],
        "tower": [tower.checkpoint.digest(), _reading(tower.checkpoint, subject, settings)],
        "clip": digests,
        "head": [list(subject.classes), list(subject.task.templates)],
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


def _reading(checkpoint: Checkpoint, subject: Subject, settings: Settings) -> object:
    """What is made of a checkpoint's tensors."""
    if not checkpoint.is_mixture:
        return checkpoint.is_task_vector
    facts = ("method", "tasks", "settings_table")
    return [settings.routing, subject.task.name, *(checkpoint.metadata.get(key) for key in facts)]


def _feature_facts(tower: Tower, subject: Subject, key: str) -> dict[str, str]:
    from mergecli.clip.features import KIND
    from mergecli.provenance import about

    images = subject.images
    made_of = {tower.name: tower.checkpoint.digest(), "data": images.fingerprint}
    return about(
        KIND, inputs=made_of, task=subject.task.name, split=images.split, token="class", evaluation=key
    )
