"""Tables that name image files and their labels: CSV, TSV, JSON lines, and `metadata.parquet`."""

from __future__ import annotations

import csv
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from mergecli.data.decoding import EncodedImage
from mergecli.data.splits import VALIDATION_NAMES, split_of
from mergecli.runtime.errors import InputError, listed, quoted
from mergecli.storage.file_state import expect_unchanged, state_of

SUFFIXES = (".csv", ".tsv", ".jsonl")
SPLIT_NAMES = ("train", "training", "test", "testing", "eval", "evaluation", *VALIDATION_NAMES)
PATH_COLUMNS = (
    "file_name", "image_file_name", "image", "path", "image_path", "img_path", "file", "filename", "file_path", "filepath",
)  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """What a task calls the columns; a name that the recipe gives is the only one that will do."""

    image: str = "image"
    label: str = "label"
    given: tuple[str, ...] = ()
    """Which of `image` and `label` the recipe names."""

    def find(self, use: str, known: Iterable[str], others: Sequence[str] = ()) -> str | None:
        """The column of `known` that holds images or labels."""
        own = self.image if use == "image" else self.label
        every = list(known)
        return next(
            (name for name in (own, *(() if use in self.given else (use, *others))) if name in every), None
        )


@dataclass(frozen=True)
class TableRows:
    """The rows of one split, from one or more tables."""

    paths: list[str] = field(default_factory=list[str])
    """Absolute, or relative to the current folder."""
    labels: list[Any] = field(default_factory=list[Any])

    def encoded(self, row: int) -> EncodedImage:
        """The image of a row, not decoded."""
        return EncodedImage(self.paths[row])


def is_table(name: str) -> bool:
    """Whether a file may name images, by its own name."""
    return name.lower().endswith(SUFFIXES) or name == "metadata.parquet"


def names_images(path: Path, columns: Columns) -> bool:
    """Whether the table has a column of paths and one of labels."""
    try:
        known = list(_columns(path))
    except (OSError, ValueError, RecursionError, csv.Error):
        return False
    return bool(columns.find("image", known, PATH_COLUMNS) and columns.find("label", known))


def read_tables(paths: Sequence[Path], root: Path, columns: Columns, where: str) -> dict[str, TableRows]:
    """Split -> its rows, in the order of the tables.

    A table belongs to the split that its name or its folder says; else each row to the split of its column `split`, or of a
    folder in its path; and where nothing says one, all rows are the split `test`.

    Raises:
        InputError: a table cannot be read, has no column of paths or labels, or names an image twice with other labels.
    """
    found: dict[str, TableRows] = defaultdict(TableRows)
    seen: dict[str, Any] = {}
    unsaid: list[str] = []
    for table in paths:
        before = state_of(table)
        rows = _read(table, where)
        expect_unchanged(table, before)
        if not rows:
            raise InputError(f"{where}: {table.name} has no rows")
        known = list(rows[0])
        image, label = columns.find("image", known, PATH_COLUMNS), columns.find("label", known)
        if image is None or label is None:
            names = {"image": columns.image, "label": columns.label}
            lacking = quoted(names[use] for use, name in (("image", image), ("label", label)) if name is None)
            raise InputError(
                f"{where}: {table.name} has no column {lacking}",
                f"it has {quoted(known)}; `image` and `label` of the task's table in the recipe name others",
            )
        fixed = _split_of_table(table, root)
        for number, row in enumerate(rows):
            path, value = row.get(image), row.get(label)
            if not isinstance(path, str) or not path or value is None or value == "":
                lacking = image if not isinstance(path, str) or not path else label
                raise InputError(f"{where}: {table.name}, row {number}: column `{lacking}` is empty")
            if seen.setdefault(str(table.parent / path), value) != value:
                raise InputError(f"{where}: {table.name}, row {number}: `{path}` stands there twice, with labels "
                                 f"`{seen[str(table.parent / path)]}` and `{value}`")  # fmt: skip
            split = fixed or _split_of_row(row, path)
            if split is None:
                unsaid.append(path)
            entry = found[split or "test"]
            entry.paths.append(os.path.join(table.parent, path))  # noqa: PTH118  a Path for each row takes longer
            entry.labels.append(value)
    if unsaid and sum(len(each.paths) for each in found.values()) > len(unsaid):
        raise InputError(
            f"{where}: {len(unsaid):,} rows such as `{unsaid[0]}` do not say their split, the others do",
            "a column `split` says it",
        )
    return dict(found)


def check_files(rows: TableRows, where: str) -> None:
    """Raises InputError if files that the rows name are not there."""
    missing = [path for path in dict.fromkeys(rows.paths) if not os.path.isfile(path)]  # noqa: PTH113  many files
    if missing:
        raise InputError(
            f"{where}: {len(missing):,} of {len(rows.paths):,} images that the table names are not there:\n{listed(missing)}",
            "paths in a table are relative to the table's folder",
        )


def _split_of_table(table: Path, root: Path) -> str | None:
    name, _ = split_of(PurePath(table.name))
    if name.casefold() in SPLIT_NAMES:
        return name
    inside = table.relative_to(root).parts[:-1] if table.is_relative_to(root) else ()
    return next((part for part in inside if part.casefold() in SPLIT_NAMES), None)


def _split_of_row(row: Mapping[str, Any], path: str) -> str | None:
    said = row.get("split")
    if isinstance(said, str) and said:
        return said
    return next((part for part in PurePosixPath(path).parts[:-1] if part.casefold() in SPLIT_NAMES), None)


def _columns(path: Path) -> Iterable[str]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_schema(path).names
    with path.open(encoding="utf-8-sig", newline="") as stream:
        if path.suffix.lower() == ".jsonl":
            first: Any = json.loads(stream.readline() or "{}")
            return list(first) if isinstance(first, dict) else []
        return next(csv.reader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ","), [])


def _read(path: Path, where: str) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix.lower() == ".jsonl":
                rows: list[Any] = [json.loads(line) for line in stream if line.strip()]
                if not all(isinstance(row, dict) for row in rows):
                    raise ValueError("a line is not an object")
                return rows
            return list(csv.DictReader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{where}: {path.name}: cannot be read: {str(error).splitlines()[0]}") from error
