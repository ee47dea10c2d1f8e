"""Labeled images of a task, on disk or drawn: Parquet files, image folders and the toy tasks, each seen as one sequence."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergecli.data.decoding import EncodedImage, UnreadableImageError, decoded
from mergecli.data.inventory import Inventory, LeftOut, counted, one_spelling, take_inventory
from mergecli.data.names import is_number, match_names, sorted_names
from mergecli.data.parquet import Rows, folder_rows, parquet_rows, table_rows
from mergecli.data.splits import VALIDATION_NAMES, check_shards, fingerprint, sha256_digest
from mergecli.data.tables import TableRows, check_files, read_tables
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError, quoted
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
    """The class names that the data itself gives, in the order of its own labels; or None."""
    names: tuple[str, ...]
    """The class names that the images are scored under, in the order of `labels`: the task's, else the data's own."""
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
    matched: str = ""
    """How the names of the data were found among the task's."""
    own_names: tuple[tuple[str, int], ...] = field(default=(), repr=False)
    """Each name of the data, and the label of its images."""
    left_out: tuple[LeftOut, ...] = field(default=(), repr=False)
    """Files that lie among the images and are not used."""

    def __len__(self) -> int:
        return len(self.every_label if self.rows is None else self.rows)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        row = self.row(index)
        try:
            return decoded(self.encoded(row)), self.every_label[row]
        except UnreadableImageError as error:
            raise self.cannot_read(row, str(error), error.hint) from error

    def __iter__(self) -> Iterator[tuple[Image, int]]:
        return (self[index] for index in range(len(self)))

    @property
    def labels(self) -> list[int]:
        """The label of each image."""
        rows = range(len(self.every_label)) if self.rows is None else self.rows
        return [self.every_label[row] for row in rows]

    @property
    def summary(self) -> str:
        """What is used and what is left out, in one line."""
        used, total = len(set(self.labels)), len(self.names)
        classes = (
            f"{used:,} of {total:,} classes"
            if used < total
            else f"{total:,} class{'es' if total != 1 else ''}"
        )
        rest = f"; left out {counted(self.left_out)}" if self.left_out else ""
        return f"{self.where}: used {len(self):,} image{'s' if len(self) != 1 else ''} in {classes} ({self.matched}){rest}"

    @property
    def lacks_images(self) -> bool:
        """Whether what was left out should not go unnoticed: it is images, or lies in the folders of classes."""
        return any(each.is_image or "/" in each.path for each in self.left_out)

    @property
    def names_by_label(self) -> tuple[str, ...]:
        """The names that images are scored under, in the order of the data's own labels."""
        ordered = tuple(self.names[label] for _, label in self.own_names)
        return ordered if self.classes is not None and set(ordered) == set(self.names) else self.names

    def warn(self) -> None:
        """Warns where not all images are used, or the number that comes out means nothing."""
        if self.lacks_images:
            warnings.warn(self.summary, MergecliWarning, stacklevel=2)
        if len(self.names) == 1:
            warnings.warn(
                f"{self.where}: there is one class alone, `{self.names[0]}`, and every answer is right",
                MergecliWarning,
                stacklevel=2,
            )

    def row(self, index: int) -> int:
        """The row in the data of the image number `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index if self.rows is None else self.rows[index]

    def chosen(self, numbers: Sequence[int]) -> Images:
        """Only the images of these numbers, in this order."""
        return replace(self, rows=[self.row(number) for number in numbers])

    def cannot_read(self, row: int, reason: str, hint: str = "") -> InputError:
        """The error for a row whose image cannot be read."""
        return InputError(
            f"{self.where}, image {row}: cannot be read: {reason}",
            hint or "copy or fetch the data again, or take the image away",
        )


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
        load, known = _on_disk(task, wanted, remember)
    own = VALIDATION_NAMES if wanted == VALIDATION else (wanted,)
    if wanted == REMAINDER and any(name in known for name in VALIDATION_NAMES):
        own = (task.train_split,)
    named = next((name for name in own if name in known), None)
    if named is not None:
        one_spelling(task.train_split if wanted == REMAINDER else wanted, known, _where(task))
        return load(named)
    if wanted in (VALIDATION, REMAINDER) and task.train_split in known:
        one_spelling(task.train_split, known, _where(task))
        whole = load(task.train_split)
        order = _shuffled(len(whole), 0)
        kept = len(order) - int(0.1 * len(order))
        rows = order[:kept] if wanted == REMAINDER else order[kept:]
        if not rows:
            raise InputError(f"{_where(task)}: a tenth of {len(order)} images is none", "name another split")
        return replace(whole, split=wanted, rows=rows)
    missing = task.train_split if wanted == REMAINDER else wanted
    raise UsageError(f"{_where(task)}: has no split `{missing}`", f"it has {quoted(known)}")


def splits_of(task: Task) -> tuple[str, ...]:
    """The splits that the task's data have.

    Raises:
        InputError: the data are missing or cannot be read.
    """
    return (_toy(task) if task.data.kind == "toy" else _on_disk(task, task.split, remember=True))[1]


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
    classes = images.names
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
        return _matched(
            task,
            Images(
                split=split,
                classes=tuple(toy.classes),
                names=(),
                fingerprint=content,
                where=f"{_where(task)}: split `{split}`",
                columns=("image", "label"),
                every_label=[index % len(toy.classes) for index in range(count)],
                encoded=lambda row: EncodedImage((name, split, row)),
            ),
        )

    return load, ("train", "test")


def _on_disk(task: Task, wanted: str, remember: bool) -> Loader:
    """A function that reads a split of a folder, of tables or of Parquet files, and the names of the splits."""
    root, where = locate(task.data), _where(task)
    if not root.exists():
        raise InputError(f"{where}: no such folder")
    named = [*(task.classes or ()), *(name for name, _ in task.mapping or ())]
    known = take_inventory(
        root, where, config=task.config, columns=task.columns, named=named,
        splits=(task.split, task.train_split, wanted),
    )  # fmt: skip
    if known.kind == "table":
        tables = read_tables(known.tables, root, task.columns, where)
        return lambda split: _of_tables(task, split, tables, known, remember), tuple(tables)
    if not known.kind:
        raise InputError(
            f"{where}: holds neither Parquet files nor a folder of images for each class"
            + (f": {known.nothing}" if known.nothing else ""),
            "expected `test-00000-of-00001.parquet` or `test/<class>/<image>.png`, or a table (`metadata.csv`) with the "
            "path and the label of each image",
        )
    classes = known.class_folders(wanted) if known.kind == "folder" else []

    def load(split: str) -> Images:
        files, place = known.splits[split], f"{where}: split `{split}`"
        is_folder = known.kind == "folder"
        if not is_folder:
            check_shards(files, place)
        content, states = fingerprint(files, with_names=is_folder, remember=remember)
        rows = folder_rows(files, states, classes) if is_folder else parquet_rows(files, place, states)

        def other_labels(column: str) -> set[str]:
            others = [each for name, each in known.splits.items() if name != split]
            return {str(label) for each in others for label in parquet_rows(each, place).labels(column)}

        found, outside = _images(task, split, rows, content, remember, other_labels)
        left_out = known.left_out.get(split if is_folder else "", ())
        return replace(found, left_out=() if outside else tuple(left_out))

    return load, tuple(known.splits)


def _of_tables(
    task: Task, split: str, tables: dict[str, TableRows], known: Inventory, remember: bool
) -> Images:
    """The images that the rows of a split name. Their digest is of the images and the labels, wherever the table lies."""
    rows = tables[split]
    check_files(rows, f"{_where(task)}: split `{split}`")
    content = sha256_digest(*(f"{label}\n" for label in rows.labels))

    def other_labels(_: str) -> set[str]:
        return {str(label) for name, each in tables.items() if name != split for label in each.labels}

    found, _ = _images(task, split, table_rows(rows), content, remember, other_labels)
    used = {os.path.normpath(path) for each in tables.values() for path in each.paths}
    root = locate(task.data)
    left_out = [each for each in known.left_out.get("", ()) if os.path.normpath(root / each.path) not in used]
    return replace(found, left_out=tuple(left_out))


def _images(
    task: Task,
    split: str,
    data: Rows,
    content: str,
    remember: bool,
    other_labels: Callable[[str], set[str]],
) -> tuple[Images, bool]:
    """The rows as images, and whether files outside of the table hold some; checks that columns and labels fit the task.

    Args:
        other_labels: the labels of the other splits in a column: a class of which this one has no image is a class, too.
    """
    found_columns = (
        data.columns
        if data.are_found
        else [task.columns.find(use, data.columns) for use in ("image", "label")]
    )
    image, label = found_columns
    where = f"{_where(task)}: split `{split}`"
    if image is None or label is None:
        names = {"image": task.image_column, "label": task.label_column}
        wanted = {use: name if use in task.columns.given else use for use, name in names.items()}
        lacking = quoted(wanted[use] for use, name in (("image", image), ("label", label)) if name is None)
        raise InputError(
            f"{where} has no column {lacking}",
            f"it has {quoted(data.columns)}; `image` and `label` under `[tasks.{task.name}]` name others",
        )
    try:
        encoded = data.images(image)
    except TypeError as error:
        raise InputError(f"{where}: column `{image}` does not hold images, but {error}") from error
    paths = dict.fromkeys(data.paths(image))
    elsewhere = [path for path in paths if os.path.isfile(path)]  # noqa: PTH113  many files
    if elsewhere:
        more, states = fingerprint(list(map(Path, elsewhere)), with_names=False, remember=remember)
        content = sha256_digest(content, more)
        encoded = _watched(encoded, dict(zip(elsewhere, states, strict=True)))
    values: Sequence[Any] = data.labels(label)
    classes = data.classes(label)
    if values and all(isinstance(value, str) for value in values):
        texts = {*values, *other_labels(label)}
        if classes is None and all(map(is_number, texts)):
            values = [int(value) for value in values]
        else:
            classes = tuple(sorted_names(texts))
            number = {name: place for place, name in enumerate(classes)}
            values = [number[value] for value in values]
    for row, value in enumerate(values):
        if not isinstance(value, int):
            raise InputError(
                f"{where}, row {row}: expected a whole number as label, or a name, got {value!r}"
            )
    found = Images(
        split=split,
        classes=classes,
        names=(),
        fingerprint=content,
        where=where,
        columns=(image, label),
        every_label=[int(value) for value in values],
        encoded=encoded,
    )
    return _matched(task, found), bool(paths)


def _watched(
    encoded: Callable[[int], EncodedImage], states: Mapping[str, int]
) -> Callable[[int], EncodedImage]:
    """The images that lie in files of their own, with the state of each file when its digest was taken."""

    def image(row: int) -> EncodedImage:
        found = encoded(row)
        path = found.content
        return found._replace(state=states.get(path)) if isinstance(path, str) else found

    return image


def _matched(task: Task, images: Images) -> Images:
    """The images under the task's names; checks that there are some and that their labels fit."""
    where, labels, own = images.where, images.every_label, images.classes
    if not labels:
        raise InputError(f"{where}: has no images")
    used = sorted(set(labels))
    if own is not None and not 0 <= used[0] <= used[-1] < len(own):
        raise InputError(
            f"{where}: labels go from {used[0]} to {used[-1]}, but the data name {len(own)} classes",
            "the data are damaged, or their labels are of another list of names",
        )
    found = match_names(own, used, task, where)
    if found.labels is not None:
        labels = [found.labels[label] for label in labels]
    if min(labels) < 0 or max(labels) >= len(found.names):
        raise InputError(
            f"{where}: labels go from {min(labels)} to {max(labels)}, but the task has {len(found.names)} classes",
            f"`classes` under `[tasks.{task.name}]` names all of them, in the order of the labels",
        )
    every = own if own is not None else [str(label) for label in used]
    places = range(len(every)) if own is not None else used
    pairs = [
        (name, found.labels[label] if found.labels else label)
        for label, name in zip(places, every, strict=True)
    ]
    return replace(images, every_label=labels, names=found.names, matched=found.how, own_names=tuple(pairs))
