"""Labeled images of a task, on disk or drawn: Parquet files, image folders and the toy tasks, each seen as one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergecli.data.decoding import EncodedImage, decoded, unreadable
from mergecli.data.parquet import Rows, folder_rows, parquet_rows
from mergecli.data.splits import VALIDATION_NAMES, fingerprint, folder_splits, parquet_splits, sha256_digest
from mergecli.runtime.errors import InputError, UsageError, quoted
from mergecli.storage.store import locate

if TYPE_CHECKING:
    from PIL.Image import Image

    from mergecli.data.tasks import Task

VALIDATION = "validation"
REMAINDER = "train-without-validation"
"""The nine tenths of the training images that are left where `validation` is the tenth."""


@dataclass(frozen=True)
class Images:
    """The images of one split: `images[i]` is the i-th as an RGB image, and its label (0 is the first class)."""

    split: str
    classes: tuple[str, ...] | None
    """The class names that the data itself gives, or None."""
    fingerprint: str
    """`xxh3:` and 32 hex digits of the content; the same wherever the data lie."""
    where: str
    """What messages call the split."""
    columns: tuple[str, str]
    """Where images and labels come from; the same content may have several."""
    every_label: Sequence[int] = field(repr=False)
    """The labels of all rows, chosen or not."""
    encoded: Callable[[int], EncodedImage] = field(repr=False)
    """The image of a row, not decoded."""
    rows: Sequence[int] | None = field(default=None, repr=False)
    """The chosen rows; None is all, in order."""

    def __len__(self) -> int:
        return len(self.every_label if self.rows is None else self.rows)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        row = self.row(index)
        try:
            return decoded(self.encoded(row)), self.every_label[row]
        except unreadable() as error:
            raise self.cannot_read(row, str(error)) from error

    def __iter__(self) -> Iterator[tuple[Image, int]]:
        return (self[index] for index in range(len(self)))

    @property
    def labels(self) -> list[int]:
        """The label of each image."""
        rows = range(len(self.every_label)) if self.rows is None else self.rows
        return [self.every_label[row] for row in rows]

    def row(self, index: int) -> int:
        """The row in the data of the image number `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index if self.rows is None else self.rows[index]

    def chosen(self, numbers: Sequence[int]) -> Images:
        """Only the images of these numbers, in this order."""
        return replace(self, rows=[self.row(number) for number in numbers])

    def cannot_read(self, row: int, reason: str) -> InputError:
        """The error for a row whose image cannot be read."""
        return InputError(f"{self.where}, image {row}: cannot be read: {reason}")


def load_images(task: Task, split: str | None = None, *, remember: bool = True) -> Images:
    """The images of the task's own split, or of another; with `remember`, the digest of large files is kept in the cache.

    `validation` is the split of that name. Where the data have none, it is a tenth of the training images, drawn as
    `torch.utils.data.random_split` does with a generator of seed 0. `train-without-validation` is the other nine tenths, or
    all training images where the data have a validation split.

    Raises:
        InputError: the data are missing, damaged, or do not fit the task's classes.
        UsageError: the data have no such split.
    """
    wanted = split or task.split
    if task.data.kind == "toy":
        load, known = _toy(task)
    else:
        load, known = _on_disk(task, remember)
    own = VALIDATION_NAMES if wanted == VALIDATION else (wanted,)
    if wanted == REMAINDER and any(name in known for name in VALIDATION_NAMES):
        own = (task.train_split,)
    named = next((name for name in own if name in known), None)
    if named is not None:
        return load(named)
    if wanted in (VALIDATION, REMAINDER) and task.train_split in known:
        whole = load(task.train_split)
        order = _shuffled(len(whole), 0)
        kept = len(order) - int(0.1 * len(order))
        rows = order[:kept] if wanted == REMAINDER else order[kept:]
        if not rows:
            raise InputError(f"{_where(task)}: a tenth of {len(order)} images is none", "name another split")
        return replace(whole, split=wanted, rows=rows)
    missing = task.train_split if wanted == REMAINDER else wanted
    raise UsageError(f"{_where(task)}: has no split `{missing}`", f"it has {quoted(known)}")


def _where(task: Task) -> str:
    return str(task.data.path or f"{task.data.kind}:{task.data.name}") + f" (task `{task.name}`)"


@dataclass(frozen=True)
class TaskImages:
    """One task and those of its images that are looked at."""

    task: Task
    images: Images
    numbers: Sequence[int] | None
    """The numbers in the split of the chosen images; None if all are."""
    classes: Sequence[str]


def task_images(
    task: Task, split: str | None = None, limit: int | None = None, *, remember: bool = True
) -> TaskImages:
    """The task with its images, or with at most `limit` of them; the rest is as `load_images` says."""
    images = load_images(task, split, remember=remember)
    classes = task.classes or images.classes or ()
    if limit is None or limit >= len(images):
        return TaskImages(task, images, None, classes)
    numbers = balanced(images.labels, limit)
    return TaskImages(task, images.chosen(numbers), numbers, classes)


def balanced(labels: Sequence[int], limit: int) -> list[int]:
    """The numbers of at most `limit` images, in order: one of each class in turn, drawn by a generator of seed 0.

    A smaller limit gives a part of what a larger one gives.
    """
    of_class: dict[int, list[int]] = {}
    turns: list[tuple[int, int, int]] = []
    for number in _shuffled(len(labels), 0):
        drawn = of_class.setdefault(labels[number], [])
        turns.append((len(drawn), labels[number], number))
        drawn.append(number)
    return sorted(number for _, _, number in sorted(turns)[:limit])


def drawn(images: Images, examples: int, seed: int | None) -> Images:
    """So many of the images, drawn by the seed; without one the first, as they are stored."""
    order = range(len(images)) if seed is None else _shuffled(len(images), seed)
    return images.chosen(order[:examples])


def _shuffled(count: int, seed: int) -> list[int]:
    """The numbers below `count` in the order in which `torch.utils.data.random_split` takes them with that seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


Loader = tuple[Callable[[str], Images], tuple[str, ...]]


def _toy(task: Task) -> Loader:
    """A function that gives a split of a toy task, and the names of its splits."""
    from mergecli.data.toy import TASKS

    name = task.data.name
    if name not in TASKS:
        raise UsageError(
            f"toy:{name} (task `{task.name}`): is not one of the toy tasks", f"they are {quoted(TASKS)}"
        )
    toy = TASKS[name]

    def load(split: str) -> Images:
        train, test = zip((toy.train, toy.test), toy.fingerprints, strict=True)
        count, content = train if split == "train" else test
        found = Images(
            split=split,
            classes=tuple(toy.classes),
            fingerprint=content,
            where=f"{_where(task)}: split `{split}`",
            columns=("image", "label"),
            every_label=[index % len(toy.classes) for index in range(count)],
            encoded=lambda row: EncodedImage((name, split, row)),
        )
        return _checked(task, found)

    return load, ("train", "test")


def _on_disk(task: Task, remember: bool) -> Loader:
    """A function that reads a split of a folder or of Parquet files, and the names of the splits."""
    root = locate(task.data)
    if not root.exists():
        raise InputError(f"{_where(task)}: no such folder")
    tables = parquet_splits(root, task.config, _where(task))
    folders = {} if tables else folder_splits(root)
    if not tables and not folders:
        raise InputError(
            f"{_where(task)}: holds neither Parquet files nor a folder of images for each class",
            "expected `test-00000-of-00001.parquet` or `test/<class>/<image>.png`",
        )
    files: Mapping[str, list[Path]] = tables or folders
    classes = sorted({file.parent.name for found in folders.values() for file in found})

    def load(split: str) -> Images:
        content = fingerprint(files[split], with_names=not tables, remember=remember)
        where = f"{_where(task)}: split `{split}`"
        rows = parquet_rows(files[split], where) if tables else folder_rows(files[split], classes)
        return _images(task, split, rows, content, remember)

    return load, tuple(files)


def _images(task: Task, split: str, data: Rows, content: str, remember: bool) -> Images:
    """The rows as images; checks that columns and labels fit the task."""
    columns = {
        use: next((name for name in (own, use) if name in data.columns), None)
        for use, own in (("image", task.image_column), ("label", task.label_column))
    }
    image, label = columns["image"], columns["label"]
    where = f"{_where(task)}: split `{split}`"
    if image is None or label is None:
        lacking = quoted(use for use, name in columns.items() if name is None)
        raise InputError(f"{where} has no column {lacking}", f"it has {quoted(data.columns)}")
    try:
        encoded = data.images(image)
    except TypeError as error:
        raise InputError(f"{where}: column `{image}` does not hold images, but {error}") from error
    elsewhere = [file for path in dict.fromkeys(data.paths(image)) if (file := Path(path)).is_file()]
    if elsewhere:
        content = sha256_digest(content, fingerprint(elsewhere, with_names=False, remember=remember))
    values: Sequence[Any] = data.labels(label)
    for row, value in enumerate(values):
        if not isinstance(value, int):
            raise InputError(f"{where}, row {row}: expected a whole number as label, got {value!r}")
    found = Images(
        split=split,
        classes=data.classes(label),
        fingerprint=content,
        where=where,
        columns=(image, label),
        every_label=[int(value) for value in values],
        encoded=encoded,
    )
    return _checked(task, found)


def _checked(task: Task, images: Images) -> Images:
    """The images; checks that there are some and that their labels fit the task's classes."""
    where, labels = images.where, images.every_label
    if not labels:
        raise InputError(f"{where}: has no images")
    classes = task.classes or images.classes
    if classes is None:
        raise InputError(
            f"{where}: has no class names of its own", f"give `classes` under `[tasks.{task.name}]`"
        )
    if min(labels) < 0 or max(labels) >= len(classes):
        raise InputError(
            f"{where}: labels go from {min(labels)} to {max(labels)}, but the task has {len(classes)} classes",
            f"`classes` under `[tasks.{task.name}]` names all of them, in the order of the labels",
        )
    if images.classes is not None and len(images.classes) < len(classes):
        raise InputError(
            f"{where}: the data have {len(images.classes)} classes, the task has {len(classes)}",
            f"`classes` under `[tasks.{task.name}]` names those of the data, in the order of the labels",
        )
    return images
