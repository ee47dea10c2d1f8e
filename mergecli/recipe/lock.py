"""`RECIPE.lock`: which commit and which files each source of a recipe was when it was fetched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tomli

from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError, UsageError, toml_text
from mergecli.storage.atomic import write_text
from mergecli.storage.file_state import state_of
from mergecli.storage.sources import HUBS, Source, is_commit, is_safe, parse_source
from mergecli.storage.store import StoredFile
from mergecli.storage.table_reader import TableReader

SCHEMA = 1
Key = tuple[bool, str]
"""Whether it is a data set, and the source as recipes write it."""


@dataclass(frozen=True)
class LockedSource:
    """What one source of a recipe was."""

    source: str
    """As the recipe writes it."""
    is_data: bool
    fetched: str
    """`hf:org/name` or `ms:org/name`: where it came from."""
    commit: str
    files: tuple[StoredFile, ...]
    license: str | None = None
    """What the hub gave as its license."""

    @property
    def key(self) -> Key:
        return self.is_data, self.source

    @cached_property
    def origin(self) -> Source:
        """The repository at that commit."""
        return replace(parse_source(self.fetched, Path()), revision=self.commit, is_data=self.is_data)


@dataclass(frozen=True)
class Lock:
    """The content of a lock file."""

    sources: Mapping[Key, LockedSource] = field(default_factory=dict[Key, LockedSource])

    def find(self, source: Source) -> LockedSource | None:
        """What the source was, if the lock has it."""
        return self.sources.get(key_of(source))

    def merged(self, new: Iterable[LockedSource]) -> Lock:
        """The lock with these in place of its own for the same sources."""
        return Lock({**self.sources, **{each.key: each for each in new}})


def key_of(source: Source) -> Key:
    """What a source is found by in a lock."""
    return source.is_data, str(source)


def lock_path(recipe: Path) -> Path:
    """Where the lock of the recipe at this path lies: beside it."""
    return recipe.with_suffix(".lock")


def lock_of(recipe: Recipe) -> Lock | None:
    """The recipe's lock, if there is one.

    Raises:
        InputError: it is damaged.
    """
    path = lock_path(recipe.path) if recipe.path else None
    return _kept(path, state_of(path)) if path and path.is_file() else None


@lru_cache(maxsize=1)
def _kept(path: Path, _state: int) -> Lock:
    """The lock in a file in that state: every point of a sweep has the same."""
    return read_lock(path)


def read_lock(path: Path) -> Lock:
    """The lock in the file.

    Raises:
        InputError: it cannot be read, or is not a lock of this version.
    """
    read = TableReader(at_once=True)
    try:
        values = tomli.loads(path.read_bytes().decode("utf-8-sig"))
        if values.get("schema") != SCHEMA or set(values) - {"schema", "source"}:
            raise ValueError(f"expected `schema = {SCHEMA}` and [[source]] tables")
        sources = [_source(each, read) for each in values.get("source", [])]
    except OSError as error:
        raise InputError(f"{path}: cannot read: {(error.strerror or '').lower()}") from error
    except (ValueError, TypeError, RecursionError, UsageError) as error:
        raise InputError(
            f"{path}: is not a lock file: {str(error).splitlines()[0]}",
            "delete it; `mergecli fetch` with the recipe writes it anew",
        ) from error
    return Lock({each.key: each for each in sources})


def write_lock(path: Path, lock: Lock) -> None:
    """Writes the lock; the same content gives the same bytes."""
    lines = [
        f"# Written by `mergecli fetch`; `mergecli fetch --locked {path.with_suffix('.toml').name}` fetches the same again.",
        f"schema = {SCHEMA}",
    ]
    for _, entry in sorted(lock.sources.items()):
        lines += ["", "[[source]]", f"source = {toml_text(entry.source)}"]
        lines += ["data = true"] if entry.is_data else []
        lines += [f"fetched = {toml_text(entry.fetched)}", f"commit = {toml_text(entry.commit)}"]
        lines += [f"license = {toml_text(entry.license)}"] if entry.license else []
        lines.append("files = [")
        for file in sorted(entry.files, key=lambda each: each.path):
            made = f", made_from = {toml_text(file.made_from)}" if file.made_from else ""
            lines.append(
                f"  {{ path = {toml_text(file.path)}, size = {file.size}, sha256 = {toml_text(file.sha256)}{made} }},"
            )
        lines.append("]")
    write_text(path, "\n".join(lines) + "\n")


def pinned_source(lock: Lock, source: Source) -> Source:
    """The source, and its adapter, as the lock has it: with `pinned` set; unchanged where the lock has it not."""
    entry = lock.find(source) if source.kind in HUBS else None
    adapter = pinned_source(lock, source.adapter) if source.adapter else None
    if entry is None and adapter == source.adapter:
        return source
    return replace(source, pinned=entry.origin if entry else source.pinned, adapter=adapter)


def pin(recipe: Recipe) -> Recipe:
    """The recipe with every source, and every data set of its task tables, as the lock beside it has it.

    Raises:
        InputError: there is a lock, and it is damaged.
    """
    lock = lock_of(recipe)
    if lock is None:
        return recipe
    return replace(
        recipe,
        base=pinned_source(lock, recipe.base) if recipe.base else None,
        tuned={name: pinned_source(lock, source) for name, source in recipe.tuned.items()},
        tasks={
            name: replace(table, data=pinned_source(lock, table.data)) if table.data else table
            for name, table in recipe.tasks.items()
        },
        pins={key: entry.origin for key, entry in lock.sources.items()},
    )


def _source(value: Any, read: TableReader) -> LockedSource:
    table = read.table(value, "source", ("source", "data", "fetched", "commit", "license", "files"))
    source, fetched, commit = (read.text(table.get(key), key) for key in ("source", "fetched", "commit"))
    origin = parse_source(fetched, Path())
    if origin.kind not in HUBS or origin.revision or origin.inside:
        read.expected("fetched", "`hf:org/name` or `ms:org/name`", fetched)
    if not is_commit(commit):
        read.expected("commit", "a commit's hexadecimal digits", commit)
    files = [_file(each, read) for each in table.get("files") or ()]
    if not files:
        read.wrong("files", f"expected at least one of `{source}`, got none")
    known = {file.path for file in files}
    if lost := [file.made_from for file in files if file.made_from and file.made_from not in known]:
        read.expected("made_from", f"one of the files of `{source}`", lost[0])
    license = read.text(table["license"], "license") if "license" in table else None
    return LockedSource(source, table.get("data") is True, fetched, commit, tuple(files), license)


def _file(value: Any, read: TableReader) -> StoredFile:
    table = read.table(value, "files", ("path", "size", "sha256", "made_from"))
    path, sha256 = read.text(table.get("path"), "path"), read.text(table.get("sha256"), "sha256")
    made_from = table.get("made_from")
    if not is_safe(path):
        read.expected("path", "a file inside the repository", path)
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        read.expected("sha256", "64 hexadecimal digits", sha256)
    return StoredFile(
        path,
        read.whole(table.get("size"), "size"),
        sha256,
        None if made_from is None else read.text(made_from, "made_from"),
    )
