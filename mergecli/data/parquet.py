"""The rows of a data set on disk: labels are read at once, encoded images one by one as they are asked for."""

from __future__ import annotations

import bisect
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergecli.data.decoding import EncodedImage
from mergecli.data.pixel_lists import png_of
from mergecli.data.tables import TableRows
from mergecli.runtime.errors import InputError, quoted
from mergecli.storage.file_state import expect_unchanged, state_of

HELD = 512 << 20
"""Bytes of encoded images that are held in memory, of all data sets together; those used last stay."""


@dataclass(frozen=True)
class Rows:
    """The columns of one split."""

    columns: tuple[str, ...]
    count: int
    classes: Callable[[str], tuple[str, ...] | None]
    """The class names of a column's labels, if the data have them."""
    labels: Callable[[str], Sequence[Any]]
    """The values of a column."""
    images: Callable[[str], Callable[[int], EncodedImage]]
    """A function that gives a column's image in a row; TypeError says that the column holds something else."""
    paths: Callable[[str], Sequence[str]]
    """Files outside the table that a column's images are in. The digest of the table does not cover them."""
    are_found: bool = False
    """Whether `columns` are the column of images and that of labels, found already by the task's names."""


def folder_rows(files: Sequence[Path], states: Sequence[int], names: Sequence[str]) -> Rows:
    """Image files, whose states are known: the name of each one's folder is its class."""
    number = {name: label for label, name in enumerate(names)}
    return Rows(
        columns=("image", "label"),
        count=len(files),
        classes=lambda _: tuple(names),
        labels=lambda _: [number[file.parent.name] for file in files],
        images=lambda _: lambda row: EncodedImage(str(files[row]), state=states[row]),
        paths=lambda _: (),
    )


def table_rows(rows: TableRows) -> Rows:
    """The rows of a table that names image files."""
    return Rows(
        columns=("image", "label"),
        count=len(rows.paths),
        classes=lambda _: None,
        labels=lambda _: rows.labels,
        images=lambda _: rows.encoded,
        paths=lambda _: rows.paths,
        are_found=True,
    )


def parquet_rows(files: Sequence[Path], where: str, states: Sequence[int] | None = None) -> Rows:
    """Parquet files one after another, as if they were one; only the row groups and columns that are used are read.

    Args:
        states: of the files when their digest was taken.

    Raises:
        InputError: one is damaged, or there are no rows; or the files differ in their columns or class names. Whatever reads
            them later raises it if one has changed.
    """
    from pyarrow import parquet

    before = dict(zip(files, states or map(state_of, files), strict=True))
    opened: list[Any] = []
    for file in files:
        with _reading(before, f"{where}: {file.name}" if opened else where):
            # not mapped into memory: what is cut off of a mapped file while it is read ends the process
            opened.append(parquet.ParquetFile(file))
    count = sum(file.metadata.num_rows for file in opened)
    schema = opened[0].schema_arrow
    features = _features(schema.metadata)
    _check_schemas(files, [file.schema_arrow for file in opened], where)
    if not count:
        raise InputError(f"{where}: has no images")
    columns: tuple[str, ...] = tuple(map(str, schema.names))

    def classes(column: str) -> tuple[str, ...] | None:
        return _class_names(features, column)

    def labels(column: str) -> list[Any]:
        with _reading(before, where):
            return [value for file in opened for value in file.read([column])[column].to_pylist()]

    def images(column: str) -> Callable[[int], EncodedImage]:
        kind = schema.field(column).type
        _check_images(kind)
        mode = features.get(column, {}).get("mode")
        return _ParquetImages(opened, before, column, where, mode if isinstance(mode, str) else None)

    def paths(column: str) -> list[str]:
        kind = schema.field(column).type
        with _reading(before, where):
            return [
                os.path.join(path.parent, each)  # noqa: PTH118  a Path for each row takes longer
                for path, file in zip(files, opened, strict=True)
                for each in _paths(file, column, kind)
            ]

    return Rows(columns, count, classes, labels, images, paths)


@contextmanager
def _reading(before: Mapping[Path, int], where: str) -> Generator[None]:
    """Refuses files that have changed, whatever was read of them; turns any other failure into one clear error."""
    failure: Exception | None = None
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        failure = error
    for file, state in before.items():
        expect_unchanged(file, state)
    if failure is not None:
        reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
        raise InputError(f"{where}: cannot be read: {reason}", "copy or fetch the data again") from failure


def _check_schemas(files: Sequence[Path], schemas: Sequence[Any], where: str) -> None:
    """Raises InputError if the files do not have the same columns, types and class names."""
    first, names = schemas[0], _features(schemas[0].metadata)
    for file, schema in zip(files[1:], schemas[1:], strict=True):
        both = f"{files[0].name} and {file.name}"
        for column in dict.fromkeys([*first.names, *schema.names]):
            types = [
                str(each.field(column).type) if column in each.names else "missing"
                for each in (first, schema)
            ]
            if types[0] != types[1]:
                raise InputError(
                    f"{where}: {both} differ in column `{column}`: {types[0]} and {types[1]}",
                    "keep the files of one version of the data",
                )
        other = _features(schema.metadata)
        for column in dict.fromkeys([*names, *other]):
            mine, theirs = (_class_names(each, column) for each in (names, other))
            if mine != theirs:
                raise InputError(
                    f"{where}: {both} differ in the class names of column `{column}`: "
                    f"{quoted(mine or ['none'])} and {quoted(theirs or ['none'])}",
                    "their labels mean different classes: write the files anew with one list of names",
                )


def _class_names(features: Mapping[str, dict[str, Any]], column: str) -> tuple[str, ...] | None:
    """The names of a ClassLabel."""
    feature = features.get(column, {})
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _paths(file: Any, column: str, kind: Any) -> list[str]:
    """The paths of those images of a column that have no bytes in the file."""
    from pyarrow import types

    if types.is_string(kind) or types.is_large_string(kind):
        return [each for each in file.read([column])[column].to_pylist() if each]
    if not types.is_struct(kind) or kind.get_field_index("path") < 0:
        return []
    found: list[str] = []
    for group in range(file.metadata.num_row_groups):
        if _have_bytes(file.metadata.row_group(group), column):
            continue
        rows = file.read_row_group(group, [column])[column].to_pylist()
        found += [each["path"] for each in rows if each and each.get("bytes") is None and each["path"]]
    return found


def _have_bytes(group: Any, column: str) -> bool:
    """Whether a row group has the bytes of every image, as far as its statistics say; then it need not be read for paths."""
    for number in range(group.num_columns):
        part = group.column(number)
        if part.path_in_schema == f"{column}.bytes":
            return bool(
                part.statistics and part.statistics.has_null_count and part.statistics.null_count == 0
            )
    return False


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """Column -> its feature as the `datasets` library wrote it into the file."""
    try:
        known: Any = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {str(name): feature for name, feature in known.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _check_images(kind: Any) -> None:
    """Raises TypeError unless an Arrow type may hold images."""
    from pyarrow import types

    plain = (
        types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_list,
        types.is_large_list, types.is_fixed_size_list,
    )  # fmt: skip
    if any(test(kind) for test in plain):
        return
    if types.is_struct(kind) and {kind.field(number).name for number in range(kind.num_fields)} & {
        "bytes",
        "path",
    }:
        return
    raise TypeError(str(kind))


class _ParquetImages:
    """The images of one column of several Parquet files; may be called from any thread.

    A row group is read as a whole, since Parquet compresses it as a whole; the last ones stay in memory for their other rows.
    """

    def __init__(
        self, files: Sequence[Any], before: Mapping[Path, int], column: str, where: str, mode: str | None
    ) -> None:
        self._column, self._where, self._mode, self._before = column, where, mode, before
        self._groups = [
            (path, file, group)
            for path, file in zip(before, files, strict=True)
            for group in range(file.metadata.num_row_groups)
        ]
        self._own = object()
        self._starts = [0]
        for _, file, group in self._groups:
            self._starts.append(self._starts[-1] + file.metadata.row_group(group).num_rows)

    def __call__(self, row: int) -> EncodedImage:
        number = bisect.bisect_right(self._starts, row) - 1
        value: Any = self._group(number)[row - self._starts[number]].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, str):
            value = os.path.join(self._groups[number][0].parent, value)  # noqa: PTH118  a Path for each row takes longer
        elif isinstance(value, list):
            try:
                value = png_of(value)
            except ValueError as error:
                raise InputError(
                    f"{self._where}: column `{self._column}`, row {row}: the pixels {error}",
                    "expected height x width x 3 or height x width numbers from 0 to 255, or image files",
                ) from error
        return EncodedImage(value, self._mode)

    def _group(self, number: int) -> Any:
        """The column's values in one row group."""
        key = (self._own, number)
        with _held.lock:
            if key not in _held.groups:
                path, file, group = self._groups[number]
                with _reading({path: self._before[path]}, self._where):
                    values: Any = file.read_row_group(group, [self._column])[self._column].combine_chunks()
                _held.add(key, values)
            _held.groups.move_to_end(key)
            return _held.groups[key]


class _Held:
    """The row groups in memory, those used last at the end."""

    def __init__(self) -> None:
        self.groups: OrderedDict[tuple[object, int], Any] = OrderedDict()
        self.lock = threading.Lock()
        self._size = 0

    def add(self, key: tuple[object, int], values: Any) -> None:
        """Keeps one more, and drops those used longest ago if all together are too large."""
        self.groups[key] = values
        self._size += values.nbytes
        while self._size > HELD and len(self.groups) > 1:
            self._size -= self.groups.popitem(last=False)[1].nbytes


_held = _Held()
