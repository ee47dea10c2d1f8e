"""What a tower is trained on: a task's images, those it is validated on, and the head that they are held against."""

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
"""Images for which the cache has no room are kept in memory if all of them take no more bytes."""


@dataclass(frozen=True)
class Lesson:
    """A task and its images, none of them decoded."""

    task: Task
    images: Images
    validation: Images | None

    @classmethod
    def of(cls, task: Task, validates: bool, split: str | None) -> Lesson:
        """The lesson of a task.

        Args:
            split: what is validated on. By default the split for validation, or where the data have none a fixed tenth
                of the training images, which is not trained on then.

        Raises:
            UsageError: there is no such split. InputError: the data are missing or damaged, or a split is empty.
        """
        from mergecli.data.images import REMAINDER, VALIDATION, load_images

        if not validates:
            return cls(task, load_images(task, task.train_split), None)
        wanted = split or VALIDATION
        held = load_images(task, wanted)
        images = load_images(task, REMAINDER if wanted == VALIDATION else task.train_split)
        if task.classes is None and held.classes != images.classes:
            raise InputError(
                f"{held.where}: has other classes than split `{images.split}`",
                f"`classes` under `[tasks.{task.name}]` names those of both",
            )
        return cls(task, images, held)

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return self.task.classes or self.images.classes or ()

    @property
    def told(self) -> dict[str, Any]:
        """What the output says of it, and its digests."""
        told: dict[str, Any] = {
            "data": self.images.fingerprint,
            "split": self.images.split,
            "task": self.task.name,
        }
        told |= {"classes": digest(self.classes), "templates": digest(self.task.templates)}
        if held := self.validation:
            about = {"split": held.split, "images": len(held), "data": held.fingerprint}
            if held.rows is not None:
                about["held_out"] = f"a tenth of split `{self.task.train_split}`"
            told["validation"] = about
        return told

    def ready(self, clip: Clip, text: str, looks: int) -> Ready:
        """The lesson with its head, and its images decoded.

        Args:
            text: `ClipDigests.text` of the CLIP.
            looks: how often an image will be looked at, all together.
        """
        from mergecli.clip.heads import cached_head

        if not is_first_here():
            wait()  # images are decoded once
        head = cached_head(clip, self.classes, self.task.templates, text, allowed_size())
        held = None if self.validation is None else _decoded(clip, self.validation)
        # it is not worth to decode all images where few are looked at
        images = _decoded(clip, self.images, keep=4 * looks >= len(self.images))
        if is_first_here():
            wait()
        return Ready(self.task.name, head, images, held)


@dataclass(frozen=True)
class Ready:
    """A lesson that can be learnt."""

    name: str
    head: Tensor
    """(C, D)."""
    images: Pixels
    validation: Pixels | None

    def batches(self, size: int, seed: int, skip: int) -> Iterator[Tensor]:
        """Row numbers of one batch after another, without end: every epoch is a new order of all rows."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        number = 0
        while True:
            for rows in torch.randperm(len(self.images), generator=generator).split(size):
                if number >= skip:
                    yield rows
                number += 1


def told_of(lessons: Sequence[Lesson]) -> dict[str, Any]:
    """What the output says of what was learnt."""
    if len(lessons) == 1:
        return lessons[0].told
    names = [each.task.name for each in lessons]
    return {"task": ", ".join(names), "tasks": {each.task.name: each.told for each in lessons}}


def _decoded(clip: Clip, images: Images, keep: bool = True) -> Pixels:
    """The images out of the cache, where they are put if it has room; else in memory, or read at every use."""
    import torch

    from mergecli.clip.pixels import Pixels, Processing, cached_pixels, stored_pixels

    cache = Processing(max_size=allowed_size())
    if keep and images.rows is not None:
        cached_pixels(clip, replace(images, rows=None), cache)  # for every choice of rows
    found = cached_pixels(clip, images, cache) if keep else stored_pixels(clip, images, cache)
    if found is None:
        return cached_pixels(clip, images, Processing())
    is_kept = not keep or found.stored is not None or stored_pixels(clip, images, cache) is not None
    if is_kept or found.read([0]).nbytes * len(images) > IN_MEMORY:
        return found
    parts: list[Tensor] = []
    for start in range(0, len(images), 256):
        interrupts.check()
        parts.append(found.batch(start, min(start + 256, len(images))))
    every = torch.cat(parts)
    return Pixels(found.labels, every, lambda numbers: every[torch.tensor(numbers)])
