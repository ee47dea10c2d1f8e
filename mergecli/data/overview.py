"""What was found for a task, split by split, and a contact sheet of its images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.data.images import Images, load_images, splits_of
from mergecli.data.inventory import counted
from mergecli.data.tasks import Task
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.atomic import check_targets, whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

PLOT_SUFFIXES = (".png", ".pdf")
_EACH = 4
"""Images of each class on the sheet."""
_SIDE, _LINE, _GAP = 64, 14, 6
"""Pixels."""


@dataclass(frozen=True)
class ClassFound:
    """One class of a split."""

    label: int
    data_names: tuple[str, ...]
    """What the data call it; none where they have numbers only, or do not have the class."""
    name: str
    """The name that stands in the prompts."""
    images: int


@dataclass(frozen=True)
class SplitFound:
    """One split of a task's data."""

    split: str
    images: int
    matched: str
    classes: tuple[ClassFound, ...]
    left_out: str
    """How many files of which kinds; empty where there are none."""
    problem: str = ""
    """Why the split cannot be used."""


def found_for(task: Task) -> tuple[SplitFound, ...]:
    """Every split of the task's data, the one that is evaluated first.

    Raises:
        InputError: there are no data, or the evaluated split cannot be used. UsageError: there is no such split.
    """
    first = _found(load_images(task))
    others: list[SplitFound] = []
    for split in splits_of(task):
        if split != task.split:
            try:
                others.append(_found(load_images(task, split)))
            except InputError as error:
                others.append(SplitFound(split, 0, "", (), "", error.message))
    return (first, *sorted(others, key=lambda each: each.split != task.train_split))


def _found(images: Images) -> SplitFound:
    counts = Counter(images.labels)
    called: dict[int, list[str]] = {}
    for name, label in images.own_names:
        called.setdefault(label, []).append(name)
    classes = tuple(
        ClassFound(label, tuple(called.get(label, ())), name, counts[label])
        for label, name in enumerate(images.names)
    )
    return SplitFound(
        images.split,
        len(images),
        images.matched,
        classes,
        counted(images.left_out) if images.left_out else "",
    )


def contact_sheet(task: Task, path: Path) -> None:
    """Draws a few images of each class of the evaluated split under the name that they are scored by.

    Raises:
        UsageError: the file cannot be written. InputError: the data cannot be used.
    """
    check_targets([(path, PLOT_SUFFIXES)], {})
    if task.data.path and path.absolute().is_relative_to(task.data.path.absolute()):
        raise UsageError(f"{path}: lies in the data of `{task.name}`, which is never written to")
    images = load_images(task)
    shown: dict[int, list[int]] = {}
    for number, label in enumerate(images.labels):
        if len(of_class := shown.setdefault(label, [])) < _EACH:
            of_class.append(number)
    wide, high = _EACH * (_SIDE + 2) + _GAP, _SIDE + _LINE + _GAP
    columns = max(1, math.ceil(math.sqrt(len(images.names) * high / wide)))
    sheet = _blank(columns * wide + _GAP, math.ceil(len(images.names) / columns) * high + _GAP)
    for label, name in enumerate(images.names):
        left, top = label % columns * wide + _GAP, label // columns * high + _GAP
        _draw_class(
            sheet, (left, top), f"{label} {name}", [_thumbnail(images, n) for n in shown.get(label, [])]
        )
    with whole_file(path) as file:
        sheet.save(file, path.suffix[1:].upper())


def _blank(width: int, height: int) -> Image:
    import PIL.Image

    return PIL.Image.new("RGB", (width, height), "white")


def _draw_class(sheet: Image, corner: tuple[int, int], title: str, pictures: Sequence[Any]) -> None:
    from PIL import ImageDraw, ImageFont

    left, top = corner
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    while len(title) > 1 and pen.textlength(title, font) > _EACH * (_SIDE + 2):
        title = title[:-2] + "…"
    pen.text(corner, title, "black", font)
    for number in range(_EACH):
        place = (left + number * (_SIDE + 2), top + _LINE)
        if number < len(pictures) and pictures[number] is not None:
            sheet.paste(pictures[number], place)
        elif number < len(pictures) or not number:
            pen.rectangle((*place, place[0] + _SIDE, place[1] + _SIDE), outline="lightgray")


def _thumbnail(images: Images, number: int) -> Image | None:
    """The image, small; None where it cannot be read."""
    import PIL.Image

    try:
        image, _ = images[number]
    except InputError:
        return None
    if (times := _SIDE // max(image.size)) > 1:
        image = image.resize((image.width * times, image.height * times), PIL.Image.Resampling.NEAREST)
    image.thumbnail((_SIDE, _SIDE))
    square = PIL.Image.new("RGB", (_SIDE, _SIDE), "lightgray")
    square.paste(image, ((_SIDE - image.width) // 2, (_SIDE - image.height) // 2))
    return square
