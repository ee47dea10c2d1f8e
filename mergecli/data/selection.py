"""Which images of a task are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergecli.data.images import Images
    from mergecli.data.tasks import Task


@dataclass(frozen=True)
class Subject:
    """One task and the images that are looked at."""

    task: Task
    images: Images
    numbers: Sequence[int] | None
    """The chosen images of the split; None if all are."""
    classes: Sequence[str]


def subject_of(task: Task, images: Images, limit: int | None) -> Subject:
    """The task with its images, or with at most `limit` of them."""
    classes = task.classes or images.classes or ()
    if limit is None or limit >= len(images):
        return Subject(task, images, None, classes)
    numbers = balanced(images.labels, limit)
    return Subject(task, images.chosen(numbers), numbers, classes)


def balanced(labels: Sequence[int], limit: int) -> list[int]:
    """The numbers of at most `limit` images, in order: one of each class in turn, drawn by a generator of seed 0.

    A smaller limit gives a part of what a larger one gives.
    """
    import torch

    drawn: dict[int, list[int]] = {}
    order: list[int] = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    turns: list[tuple[int, int, int]] = []
    for number in order:
        of_class = drawn.setdefault(labels[number], [])
        turns.append((len(of_class), labels[number], number))
        of_class.append(number)
    return sorted(number for _, _, number in sorted(turns)[:limit])


def drawn(images: Images, examples: int, seed: int | None) -> Images:
    """So many of the images, drawn by the seed; without one the first, as they are stored."""
    import torch

    count = min(examples, len(images))
    if seed is None:
        return images.chosen(range(count))
    order: list[int] = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    return images.chosen(order[:count])
