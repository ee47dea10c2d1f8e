"""`cache`: what evaluations keep for later ones, how large it may grow and what goes first; and what merges have measured
and learned, which stays until it is removed by name."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

from mergecli.runtime.distributed import are_several
from mergecli.runtime.dry_run import is_dry
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError, did_you_mean
from mergecli.storage.checkpoint import Checkpoint, open_checkpoint
from mergecli.storage.checksums import DamagedFileError
from mergecli.storage.metadata import inputs_of
from mergecli.storage.sizes import parse_size
from mergecli.storage.store import cache_folder, home
from mergecli.storage.unfinished import is_leftover

PASSING = ("pixels", "heads", "results", "digests")
"""Images; heads; what unfinished evaluations have so far; digests of large data files."""
LASTING = ("statistics", "coefficients", "experts")
"""What merges have measured, and learned, and what tasks' own models predict. It does not count in the size that the cache may grow to."""
KINDS = (*PASSING, *LASTING)

DEFAULT_SIZE = 20 * 10**9
SPARE = 10**9
"""So many bytes of the disk are left free."""

T = TypeVar("T")

_STALE = 24 * 3600
"""Seconds after which a file that is not whole was left by a program that was killed."""


@dataclass(frozen=True)
class CachedFile:
    """One file of the cache."""

    kind: str
    what: str
    """What it holds, in words."""
    size: int
    """Bytes."""
    last_used: str
    """ISO 8601, UTC, to the second."""
    path: Path


@dataclass(frozen=True)
class Cache:
    """What the cache holds."""

    folder: Path
    entries: tuple[CachedFile, ...]
    """The last used first."""
    removed: tuple[CachedFile, ...]
    max_size: int
    """Bytes that it may grow to."""

    @property
    def size(self) -> int:
        """Bytes of all entries."""
        return sum(entry.size for entry in self.entries)


def cache(kinds: Sequence[str] = (), *, clear: bool = False, max_size: str | int | None = None) -> Cache:
    """What the cache holds, after some of it was removed if that is asked for.

    Args:
        kinds: of `KINDS`; none stands for all.
        clear: remove these kinds; without any, the `PASSING` ones.
        max_size: remove of these kinds, as far as they are `PASSING`, what was used longest ago, until the rest takes no
            more, such as `5GB`.

    Raises:
        UsageError: a kind or a size that there is not.
        InputError: something cannot be removed.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(
                f"cache: expected one of {', '.join(KINDS)}, got `{kind}`{did_you_mean(kind, KINDS)}"
            )
    bound = allowed_size(max_size)
    every = entries()
    removed: list[CachedFile] = []
    if clear:
        removed = [entry for entry in every if entry.kind in (kinds or PASSING)]
    elif max_size is not None:
        passing = [each for each in kinds or PASSING if each in PASSING]
        oldest = {file.path for file in _oldest(_files(passing), bound)}
        removed = [entry for entry in every if entry.path in oldest]
    for entry in removed:
        _remove(entry.path)
    gone = {entry.path for entry in removed}
    kept = tuple(entry for entry in every if entry.path not in gone and entry.kind in (kinds or KINDS))
    return Cache(cache_folder(), kept, tuple(removed), bound)


def entries() -> list[CachedFile]:
    """Everything in the cache, the last used first."""
    return [
        CachedFile(
            kind=file.kind,
            what=_what(file.path),
            size=file.size,
            last_used=datetime.fromtimestamp(file.used, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            path=file.path,
        )
        for file in _files(KINDS)
    ]


def cache_path(kind: str, key: str) -> Path:
    """The file of the kind `kind` that holds what the digest `key` stands for, whether it is there or not."""
    return cache_folder() / kind / f"{key.rpartition(':')[2]}.safetensors"


def kept(path: Path, what: str, read: Callable[[Checkpoint], T]) -> T | None:
    """What `read` makes of a file that can be made again; None if there is none. A damaged one goes, with a note that says
    `what` is made again."""
    if not os.path.exists(path):  # noqa: PTH110
        return None
    try:
        with open_checkpoint(path, checked=True) as stored:
            return read(stored)
    except DamagedFileError as error:
        remove_damaged(error, what)
    except (InputError, OSError, KeyError, ValueError, TypeError):
        pass  # it has just gone, or is of another version, which will be written over
    return None


def remove_damaged(error: DamagedFileError, what: str) -> None:
    """Removes a file that can be made again, if the disk can be written, and says so."""
    if not is_dry():
        with contextlib.suppress(OSError):
            error.file.unlink(missing_ok=True)
    warnings.warn(f"{error.message}; {what} again", MergecliWarning, stacklevel=2)


def made_again(work: Callable[[], T]) -> T:
    """What `work` returns. Where it finds a file of the store damaged that a method measured or learned, the file is removed,
    with a note, and the work starts again.

    Raises:
        DamagedFileError: the file is the user's own, was made again already, or several processes share the work, which look
            at such files before.
    """
    gone: set[Path] = set()
    while True:
        token = _gone.set(frozenset(gone))
        try:
            return work()
        except DamagedFileError as error:
            ours = any(error.file.is_relative_to(home() / kind) for kind in LASTING)
            if not ours or error.file in gone or are_several():
                raise
            gone.add(error.file)
            remove_damaged(error, "it is made")
        finally:
            _gone.reset(token)


_gone: ContextVar[frozenset[Path]] = ContextVar("gone", default=frozenset())
"""Damaged files that are removed, or in a dry run would be."""


def is_stored(path: Path) -> bool:
    """Whether a file that a method measured or learned is there; in a dry run one that was found damaged is none."""
    return path.exists() and not (is_dry() and path in _gone.get())


def touch(path: Path) -> None:
    """Notes that the file was used just now, if the disk can be written."""
    if not is_dry():
        with contextlib.suppress(OSError):
            os.utime(path)


def allowed_size(given: str | int | None = None) -> int:
    """Bytes that the cache may take: as given, else `MERGECLI_CACHE_SIZE`, else 20 GB or half of what the disk has
    for it, whichever is less.

    Raises:
        UsageError: it is no size.
    """
    if isinstance(given, int):
        return given
    text = given if given is not None else os.environ.get("MERGECLI_CACHE_SIZE")
    if text is None:
        return min(DEFAULT_SIZE, (_free() + sum(file.size for file in _files())) // 2)
    return parse_size(text, "cache size" if given is not None else "MERGECLI_CACHE_SIZE")


def make_room(size: int, max_size: int) -> bool:
    """Whether a new file of so many bytes may be written; what was used longest ago is removed for it."""
    if size > max_size or is_dry():
        return False
    every = _files()
    parts = [file for file in every if file.path.suffix == ".part"]
    left = {file for file in parts if is_leftover(file.path) or time.time() - file.used > _STALE}
    rest = [file for file in every if file not in left]
    for file in [*left, *_oldest(rest, max_size - size)]:
        with contextlib.suppress(InputError):
            _remove(file.path)
    return _free() >= size + SPARE


class _File(NamedTuple):
    """A file of the cache, as the disk has it."""

    used: float
    """Seconds since 1970."""
    kind: str
    path: Path
    size: int


def _files(kinds: Sequence[str] = PASSING) -> list[_File]:
    """Everything of these kinds, the last used first."""
    found: list[_File] = []
    for kind, path in _paths(kinds):
        with contextlib.suppress(OSError):
            status = path.stat()
            found.append(_File(status.st_mtime, kind, path, status.st_size))
    return sorted(found, key=lambda file: (-file.used, file.path))


def _oldest(files: Sequence[_File], bound: int) -> list[_File]:
    """Those last used longest ago of the files, of which the last used come first, so that the others take at most `bound`
    bytes."""
    every = list(files)
    total = sum(file.size for file in every)
    chosen: list[_File] = []
    while every and total > bound:
        chosen.append(every.pop())
        total -= chosen[-1].size
    return chosen


def _paths(kinds: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Kind and path of everything of these kinds, whole or not."""
    for kind in kinds:
        folder = home() / kind if kind in LASTING else cache_folder() / kind
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".safetensors", ".part"):
                yield kind, path


def _what(path: Path) -> str:
    """What the file says that it holds."""
    if path.suffix == ".part":
        return "not finished"
    try:
        with open_checkpoint(path) as stored:
            metadata = stored.metadata
    except InputError:
        return "damaged" if os.access(path, os.R_OK) else "cannot be read"
    if "method" in metadata:
        tasks = [name for name in inputs_of(metadata) if name != "base"]
        return f"{metadata['method']} of {', '.join(tasks)}"
    return metadata.get("what") or metadata.get("kind", "")


def _free() -> int:
    """Bytes free on the disk of the cache; 0 where that cannot be known."""
    for folder in (cache_folder(), *cache_folder().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


def _remove(path: Path) -> None:
    """Removes it; programs that have it open can read on."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be removed: {(error.strerror or '').lower()}") from error
