"""Training data of a task: its images, its validation images, and its zero-shot head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergecli.data.tasks import Task, digest
from mergecli.runtime import interrupts
from mergecli.runtime.distributed import is_first_here, wait
from mergecli.runtime.errors import InputError
from mergecli.storage.cache import allowed_size

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.model import Clip
    from mergecli.clip.pixels import Pixels
    from mergecli.data.images import Images

IN_MEMORY = 1 << 30
"""Images that do not fit into the cache are kept in memory if they take at most this many bytes."""


@dataclass(frozen=True)
class TrainingTask:
    """A task and its images, not decoded."""

    task: Task
    images: Images
    validation: Images | None

    @classmethod
    def of(cls, task: Task, validates: bool, split: str | None) -> TrainingTask:
        """The images of a task.

        Args:
            validates: whether validation images are needed.
            split: the validation split. By default it is the split `validation`. Data without one hold out a fixed
                tenth of the training images.

        Raises:
            UsageError: there is no such split. InputError: the data are missing or damaged, or a split is empty.
        """
        from mergecli.data.images import REMAINDER, VALIDATION, load_images

        if not validates:
            images = load_images(task, task.train_split)
            images.warn()
            return cls(task, images, None)
        wanted = split or VALIDATION
        held = load_images(task, wanted)
        images = load_images(task, REMAINDER if wanted == VALIDATION else task.train_split)
        images.warn()
        if held.names != images.names:
            raise InputError(
                f"{held.where}: its classes are not those of split `{images.split}`",
                f"`classes` under `[tasks.{task.name}]` names those of both",
            )
        return cls(task, images, held)

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return self.images.names

    @property
    def as_metadata(self) -> dict[str, Any]:
        """The task as the output records it, with digests of its data."""
        recorded: dict[str, Any] = {
            "data": self.images.fingerprint,
            "split": self.images.split,
            "task": self.task.name,
        }
        recorded |= {"classes": digest(self.classes), "templates": digest(self.task.templates)}
        if held := self.validation:
            about = {"split": held.split, "images": len(held), "data": held.fingerprint}
            if held.rows is not None:
                about["held_out"] = f"a tenth of split `{self.task.train_split}`"
            recorded["validation"] = about
        return recorded

    def check(self, clip: Clip) -> None:
        """Raises InputError if the text tower cannot read one of the prompts."""
        from mergecli.clip.heads import check_prompts

        check_prompts(clip, self.classes, self.task.templates)

    def prepare(self, clip: Clip, text: str, views: int) -> PreparedTask:
        """The task with its zero-shot head and its images decoded.

        Args:
            text: `ClipDigests.text` of the CLIP.
            views: how many images training will read in all, repetitions counted.
        """
        from mergecli.clip.heads import cached_head

        if not is_first_here():
            wait()  # the first process of a machine decodes, the others read its cache
        head = cached_head(clip, self.classes, self.task.templates, text, allowed_size())
        held = None if self.validation is None else _decoded(clip, self.validation)
        images = _decoded(clip, self.images, keep=is_kept(self.images, views))
        if is_first_here():
            wait()
        return PreparedTask(self.task.name, head, images, held)


@dataclass(frozen=True)
class PreparedTask:
    """A task, ready for training."""

    name: str
    head: Tensor
    """(C, D)."""
    images: Pixels
    validation: Pixels | None

    def batches(self, size: int, seed: int, skip: int) -> Iterator[Tensor]:
        """Row numbers of one batch after another, without end. Each epoch shuffles all rows.

        Args:
            skip: batches to leave out at the start, which an interrupted training has already seen.
        """
        import torch

        generator = torch.Generator().manual_seed(seed)
        number = 0
        while True:
            for rows in torch.randperm(len(self.images), generator=generator).split(size):
                if number >= skip:
                    yield rows
                number += 1


def is_kept(images: Images, views: int) -> bool:
    """Whether all images are decoded once and kept: a short training reads few of them, and all would take longer."""
    return 4 * views >= len(images)


def tasks_metadata(tasks: Sequence[TrainingTask]) -> dict[str, Any]:
    """The tasks as the output records them."""
    if len(tasks) == 1:
        return tasks[0].as_metadata
    names = [each.task.name for each in tasks]
    return {"task": ", ".join(names), "tasks": {each.task.name: each.as_metadata for each in tasks}}


def _decoded(clip: Clip, images: Images, keep: bool = True) -> Pixels:
    """The decoded images: in the cache if it has room, else in memory if they are few, else decoded at every use."""
    import torch

    from mergecli.clip.pixels import Pixels, Processing, cached_pixels, stored_pixels

    cache = Processing(max_size=allowed_size())
    if keep and images.rows is not None:
        cached_pixels(clip, replace(images, rows=None), cache)  # cached whole, for every choice of rows
    found = cached_pixels(clip, images, cache) if keep else stored_pixels(clip, images, cache)
    if found is None:
        return cached_pixels(clip, images, Processing())
    stays = not keep or found.stored is not None or stored_pixels(clip, images, cache) is not None
    if stays or found.read([0]).nbytes * len(images) > IN_MEMORY:
        return found
    parts: list[Tensor] = []
    for start in range(0, len(images), 256):
        interrupts.check()
        parts.append(found.batch(start, min(start + 256, len(images))))
    every = torch.cat(parts)
    return Pixels(found.labels, every, lambda numbers: every[torch.tensor(numbers)])
