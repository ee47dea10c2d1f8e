"""What a data folder holds: which files are which split, which folders are classes, and what is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath

from mergecli.data.names import normalized, sorted_names
from mergecli.data.splits import VALIDATION_NAMES, split_of
from mergecli.data.tables import SPLIT_NAMES, SUFFIXES, Columns, is_table, names_images
from mergecli.runtime.errors import InputError, quoted

_SAME_SPLITS = (("train", "training"), ("test", "testing"), VALIDATION_NAMES)
_PARTS = (
    "image",
    "images",
    "img",
    "imgs",
    "jpegimages",
    "mask",
    "masks",
    "label",
    "labels",
    "annotations",
    "data",
)
"""Folders that hold a part of every example, and are no classes."""
_SUFFIXES = frozenset(
    (
        ".png",
        ".jpg",
        ".jpeg",
        ".jfif",
        ".jpe",
        ".jp2",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".avif",
    )
)
"""A file with one of these is an image, damaged or not. Of any other file, the content decides."""
_DEEPEST = 12


@dataclass(frozen=True)
class LeftOut:
    """A file that is no image of a class, and what it is."""

    path: str
    what: str
    is_image: bool


@dataclass(frozen=True)
class Inventory:
    """The files of a data folder."""

    kind: str
    """`parquet`, `table` or `folder`; empty where there is nothing to read."""
    splits: Mapping[str, Sequence[Path]]
    """Split -> its Parquet files, tables or images."""
    left_out: Mapping[str, Sequence[LeftOut]] = field(default_factory=dict[str, "Sequence[LeftOut]"])
    """Split -> what lies in it, or beside all splits, and is not used. Of tables under an empty name: all image files of the
    folder, of which those are left out that no row names."""
    tables: Sequence[Path] = ()
    """Files that name images and their labels."""
    classes: Mapping[str, Collection[str]] = field(default_factory=dict[str, "Collection[str]"])
    """Split -> the names of its class folders."""
    nothing: str = ""
    """Where there is nothing to read: what there is instead."""

    def class_folders(self, wanted: str) -> list[str]:
        """The names of the class folders, in order, over all splits that belong together."""
        names = {name for name in self.splits if name == wanted or _is_split(name)}
        return sorted_names({each for name in names for each in self.classes[name]})


@dataclass(frozen=True)
class _File:
    parts: tuple[str, ...]
    """Relative to the root."""
    path: str
    is_file: bool
    """A regular file, and no device or broken link."""

    @cached_property
    def is_image(self) -> bool:
        return (
            self.is_file
            and not is_table(self.parts[-1])
            and (self.suffix in _SUFFIXES or _pillow_reads(self.path))
        )

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.parts[-1])[1].lower()  # noqa: PTH122  a Path for each file takes longer

    @property
    def left_out(self) -> LeftOut:
        readable = self.is_image
        what = "image" if readable else self.suffix if self.is_file and self.suffix else "unreadable"
        return LeftOut("/".join(self.parts), what, readable)


def take_inventory(
    root: Path,
    where: str,
    *,
    config: str | None = None,
    columns: Columns | None = None,
    named: Collection[str] = (),
    splits: Collection[str] = (),
) -> Inventory:
    """What the folder or file `root` holds.

    Hidden files and folders, and those called `__MACOSX`, are no data at any level.

    Args:
        config: the folder that counts, where there are several configurations.
        named: class names that the task gives: a class folder may be called so, whatever the word means otherwise.
        splits: names of splits that the task gives.

    Raises:
        InputError: the folder can be read in more than one way, and each would give other numbers.
    """
    columns = columns or Columns()
    if root.is_file():
        if is_table(root.name):
            return Inventory("table", {}, tables=[root])
        if root.suffix.lower() != ".parquet" and not _is_parquet(root):
            raise InputError(
                f"{where}: is neither a Parquet file nor a table of images ({', '.join(SUFFIXES)})",
                "name such a file, or a folder",
            )
        return Inventory("parquet", _parquet([_File((root.name,), str(root), True)], where))
    files = _walk(root)
    parquet = [
        file for file in files if file.suffix == ".parquet" and file.is_file and not is_table(file.parts[-1])
    ]
    if parquet:
        chosen = [file for file in parquet if config in file.parts[:-1]] or parquet
        return Inventory(
            "parquet", _parquet(chosen, where), {"": [file.left_out for file in files if file.is_image]}
        )
    paths = [Path(file.path) for file in files if file.is_file and is_table(file.parts[-1])]
    tables = [path for path in paths if names_images(path, columns)]
    metadata = [path for path in tables if path.stem == "metadata"]
    if metadata:
        return Inventory("table", {}, _images_in(files), metadata)
    try:
        found = _folders(files, {normalized(name) for name in named}, splits, where)
    except _OddClassesError:
        if tables:
            return Inventory("table", {}, _images_in(files), tables)
        raise
    # a table that names no images is read all the same where there is nothing else: it says then what it lacks
    return Inventory("table", {}, _images_in(files), tables or paths) if paths and not found.kind else found


def _is_parquet(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"PAR1"


def _images_in(files: Sequence[_File]) -> dict[str, list[LeftOut]]:
    return {"": [file.left_out for file in files if file.is_image]}


def one_spelling(wanted: str, known: Collection[str], where: str) -> None:
    """Raises InputError if the data have the split under another spelling too."""
    group = next((group for group in _SAME_SPLITS if wanted == group[0]), (wanted,))
    same = [name for name in known if name.casefold() in group or name.casefold() == wanted.casefold()]
    if len(same) > 1:
        raise InputError(
            f"{where}: has split `{wanted}` under {len(same)} names: {quoted(same)}",
            "put the files of one split together, or take those away that are not it",
        )


def counted(left_out: Sequence[LeftOut]) -> str:
    """`14 files: 12 .svg, 2 unreadable`."""
    kinds = Counter(each.what for each in left_out)
    shown = [
        f"{count:,} {what}{'s' if what == 'image' and count != 1 else ''}"
        for what, count in kinds.most_common(5)
    ]
    if (rest := len(left_out) - sum(count for _, count in kinds.most_common(5))) > 0:
        shown.append(f"{rest:,} others")
    return f"{len(left_out):,} file{'s' if len(left_out) != 1 else ''}: {', '.join(shown)}"


def _is_split(name: str, given: Collection[str] = ()) -> bool:
    return name.casefold() in SPLIT_NAMES or name in given


def _walk(root: Path) -> list[_File]:
    """Every file below the folder, in order; follows links, but not back to a folder that it lies in."""
    found: list[_File] = []

    def visit(folder: str, parts: tuple[str, ...], above: tuple[str, ...]) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{folder}: cannot read: {(error.strerror or '').lower()}") from error
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            inner = (*parts, entry.name)
            if entry.is_dir():
                real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if real not in above and len(inner) < _DEEPEST:
                    visit(entry.path, inner, (*above, real))
            else:
                found.append(_File(inner, entry.path, entry.is_file()))

    visit(str(root), (), (os.path.realpath(root),))
    return found


def _parquet(files: Sequence[_File], where: str) -> dict[str, list[Path]]:
    """Split -> its Parquet files, from names as `test-00000-of-00002.parquet`, `test.parquet` or `test/0.parquet`."""
    found: dict[str, list[Path]] = {}
    homes: dict[str, set[PurePath]] = {}
    for file in files:
        split, folder = split_of(PurePath(*file.parts))
        found.setdefault(split, []).append(Path(file.path))
        homes.setdefault(split, set()).add(folder)
    for split, folders in homes.items():
        if len(folders) > 1:
            names = [folder.as_posix() for folder in sorted(folders)]
            raise InputError(
                f"{where}: has split `{split}` in several folders: {quoted(names)}",
                "give one of them as the task's `data`",
            )
    return {split: sorted(each) for split, each in found.items()}


def _folders(
    files: Sequence[_File], named: Collection[str], splits: Collection[str], where: str
) -> Inventory:
    """Images in `<split>/<class>/`, or in `<class>/` for data of one split, called `test`."""
    at = {depth: [file for file in files if len(file.parts) == depth] for depth in (1, 2, 3)}
    tops = {depth: dict.fromkeys(file.parts[0] for file in at[depth] if file.is_image) for depth in (2, 3)}
    has_splits = bool(tops[3]) and (not tops[2] or any(_is_split(top, splits) for top in tops[3]))
    depth = 3 if has_splits else 2
    found: dict[str, list[Path]] = {}
    classes: dict[str, set[str]] = {}
    for file in at[depth]:
        if file.is_image:
            split = file.parts[0] if has_splits else "test"
            found.setdefault(split, []).append(Path(file.path))
            classes.setdefault(split, set()).add(file.parts[-2])
    if not found:
        return Inventory("", {}, nothing=_instead(files))
    for split, names in classes.items():
        _check_classes(names, f"{split}/" if has_splits else "", named, where)
    left_out: dict[str, list[LeftOut]] = {split: [] for split in found}
    for file in files:
        if len(file.parts) == depth and file.is_image:
            continue
        if not has_splits:
            left_out["test"].append(file.left_out)
        elif file.parts[0] in found and len(file.parts) > 1:
            left_out[file.parts[0]].append(file.left_out)
        elif len(file.parts) == 1:
            for each in left_out.values():
                each.append(file.left_out)
    return Inventory("folder", found, left_out, classes=classes)


def _check_classes(classes: Collection[str], inside: str, named: Collection[str], where: str) -> None:
    """Raises InputError if folders that hold images are splits or parts of examples, by their names."""
    odd = sorted(
        name for name in classes
        if (_is_split(name) or name.casefold() in _PARTS) and normalized(name) not in named
    )  # fmt: skip
    if not odd or (len(odd) < len(classes) and all(map(_is_split, odd)) and len(odd) == 1):
        return  # a class may well be called `train`, as in CIFAR-100
    folders = quoted(f"{inside}{name}" for name in odd)
    raise _OddClassesError(
        f"{where}: the images lie in {folders}, which are names of {'splits' if all(map(_is_split, odd)) else 'parts of a data set'} "
        "and not of classes",
        "expected `<split>/<class>/<image>`, or a table with the path and the label of each image; "
        "if they are classes, name them in `classes`",
    )


class _OddClassesError(InputError):
    """Folders of images whose names are no classes; a table may say what the images are."""


def _instead(files: Sequence[_File]) -> str:
    """What a folder holds that has no folder of images for each class."""
    images = [file for file in files if file.is_image]
    if not images:
        return ""
    flat = [file for file in images if len(file.parts) == 1]
    if flat:
        return f"{len(flat):,} images lie in it without a folder for each class"
    return f"{len(images):,} images lie deeper, such as `{'/'.join(images[0].parts)}`"


def _pillow_reads(path: str) -> bool:
    """Whether Pillow takes the file's content for an image."""
    try:
        with open(path, "rb") as stream:  # noqa: PTH123  a Path for each of many files takes longer than to open it
            begin = stream.read(512)
        if not begin or (_is_text(begin) and not begin.startswith((b"P", b"/* XPM"))):
            return False
        import PIL.Image
        from PIL import ImageFile

        with PIL.Image.open(path) as image:
            return not isinstance(image, ImageFile.StubImageFile) and image.format not in ("EPS", "MPEG")
    except Exception:  # noqa: BLE001  Pillow's errors are of any kind; what it cannot read is no image
        return False


def _is_text(begin: bytes) -> bool:
    return not begin.translate(None, b"\t\n\r" + bytes(range(32, 127)))
