"""Counts: how many images of one task each of several vision towers gets right."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergecli import interrupts
from mergecli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.checkpoint import Checkpoint
    from mergecli.clip.images import Images
    from mergecli.clip.model import Clip
    from mergecli.progress import Progress

PIXEL_BYTES = 1 << 30
"""Of one task's processed images, so many bytes are kept while the towers take turns."""


@dataclass
class Tally:
    """What one tower has got so far on one task."""

    correct: int = 0
    loss: float = 0.0
    batch_means: list[float] = field(default_factory=list[float])
    labels: list[int] = field(default_factory=list[int])
    chosen: list[int] = field(default_factory=list[int])
    probabilities: list[float] = field(default_factory=list[float])


class Towers:
    """A CLIP whose vision tower is any of the checkpoints, one at a time."""

    def __init__(self, clip: Clip, checkpoints: Sequence[Checkpoint]) -> None:
        self.clip, self.checkpoints, self._current = clip, checkpoints, -1

    def use(self, number: int) -> None:
        """Puts a checkpoint's weights in, unless they are there already."""
        from mergecli.clip.model import set_tower

        if number != self._current:
            set_tower(self.clip, self.checkpoints[number])
            self._current = number


def count(
    towers: Towers, head: Tensor, images: Images, size: int, task: str, progress: Progress | None
) -> list[Tally]:
    """What each tower gets on the images; chunks of them are processed once and shown to every tower."""
    import torch
    from torch.nn.functional import cross_entropy

    from mergecli.clip.heads import logits

    tallies = [Tally() for _ in towers.checkpoints]
    done, total = 0, len(images) * len(tallies)
    for chunk in _chunks(towers.clip, images, size, PIXEL_BYTES if len(tallies) > 1 else 0):
        for number, tally in enumerate(tallies):
            towers.use(number)
            for pixel_values, labels in chunk:
                interrupts.check()
                got = logits(towers.clip, head, pixel_values.to(head.device)).float().cpu()
                losses = cross_entropy(got, labels, reduction="none").double()
                if not bool(losses.isfinite().all()):
                    raise InputError(
                        f"{towers.checkpoints[number].path}: gives NaN or infinite logits on task `{task}`",
                        "look at the weights with `mergecli info`",
                    )
                chosen = got.argmax(dim=1)
                tally.correct += int((chosen == labels).sum())
                tally.loss += float(losses.sum())
                tally.batch_means.append(float(losses.mean()))
                tally.labels += labels.tolist()
                tally.chosen += chosen.tolist()
                tally.probabilities += torch.softmax(got, dim=1).amax(dim=1).tolist()
                done += len(labels)
                if progress is not None:
                    progress(task, done, total)
    return tallies


def _chunks(clip: Clip, images: Images, size: int, room: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Lists of batches ((B, 3, H, W) pixels, (B,) labels) of about `room` bytes of pixels, at least one batch."""
    chunk: list[tuple[Tensor, Tensor]] = []
    held = 0
    for batch, labels in _batches(clip, images, size, workers_for(clip)):
        chunk.append((batch, labels))
        held += batch.nbytes
        if held + batch.nbytes > room:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def workers_for(clip: Clip) -> int:
    """Threads that process images while the model computes; none where both would want the same processors."""
    return 0 if clip.device.type == "cpu" else min(8, os.cpu_count() or 1)


def _batches(clip: Clip, images: Images, size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """((B, 3, H, W) pixels, (B,) labels) in order; with workers the next batch is processed meanwhile."""
    import torch

    from mergecli.clip.model import pixels

    def process(rows: range) -> tuple[Tensor, list[int]]:
        pairs = [images[row] for row in rows]
        return pixels(clip, [image for image, _ in pairs]), [label for _, label in pairs]

    every = [range(start, min(start + size, len(images))) for start in range(0, len(images), size)]
    if not workers:
        for rows in every:
            batch, labels = process(rows)
            yield batch, torch.tensor(labels)
        return
    with ThreadPoolExecutor(workers) as pool:
        part = -(-size // workers)

        def begin(rows: range) -> list[Future[tuple[Tensor, list[int]]]]:
            return [pool.submit(process, rows[start : start + part]) for start in range(0, len(rows), part)]

        coming = begin(every[0])
        for number in range(len(every)):
            parts = [each.result() for each in coming]
            coming = begin(every[number + 1]) if number + 1 < len(every) else []
            yield (
                torch.cat([batch for batch, _ in parts]),
                torch.tensor([x for _, labels in parts for x in labels]),
            )
