"""Calibration data: the images of each task that a method looks at, without their labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergecli.data.tasks import Task, digest, find
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.store import locate

if TYPE_CHECKING:
    from mergecli.data.images import Images


@dataclass(frozen=True)
class CalibrationTask:
    """A task and its images without labels; None where they are not on this machine."""

    name: str
    task: Task | None = None
    images: Images | None = None

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes."""
        if self.images is not None:
            return self.images.names
        return (self.task.classes if self.task else None) or ()

    @property
    def templates(self) -> Sequence[str]:
        """The prompts."""
        return self.task.templates if self.task else ()

    def facts(self, *, head: bool, most: int | None = None) -> dict[str, Any]:
        """Metadata that identifies the images: split, number and digest; with `head` digests of class names and prompts.

        Args:
            most: how many of the images are looked at, at most; all by default.
        """
        if self.images is None:
            return {}
        count = len(self.images) if most is None else min(most, len(self.images))
        found: dict[str, Any] = {"split": self.images.split, "images": count}
        found["data"] = self.images.fingerprint
        if head:
            found |= {"classes": digest(self.classes), "templates": digest(self.templates)}
        return found

    def sampled(self, count: Callable[[int], int], label: str, seed: int) -> CalibrationTask:
        """The task with `count(N)` of its N images, drawn by label and seed, in the order of the data."""
        from mergecli.methods._base import uniform

        assert self.images is not None
        total = len(self.images)
        wanted = count(total)
        if wanted == total:
            return self
        order = uniform(seed, label, self.name, 0, total).argsort(stable=True)
        return replace(self, images=self.images.chosen(order[:wanted].sort().values.tolist()))


def task_of(model: str, recipe: Recipe) -> Task:
    """The task that a model is named after.

    Raises:
        UsageError: there is no such task.
    """
    try:
        return find(model, recipe)
    except UsageError as error:
        raise UsageError(
            f"model `{model}`: `{recipe.method}` looks at images of the task that it is named after: {error.message}",
            f"name it after one, or define it in `[tasks.{model}]` of a recipe; `mergecli tasks` lists the built-in ones",
        ) from error


def calibration_task(
    name: str, split: str, recipe: Recipe, *, may_lack_images: bool = False
) -> CalibrationTask:
    """A task with the images of a split; `train` and `test` are those that the task itself calls so.

    Raises:
        UsageError: there is no such task, or no such split. InputError: the images are missing or damaged.
    """
    from mergecli.data.images import load_images

    try:
        task = task_of(name, recipe)
        if task.data.kind != "toy":
            locate(task.data)
    except (UsageError, InputError):
        if may_lack_images:
            return CalibrationTask(name)
        raise
    own = {"train": task.train_split, "test": task.split}
    images = load_images(task, own.get(split, split))
    images.warn()
    return CalibrationTask(name, task, images)
