"""What the store and the cache hold, and whether a sample of it is what was written."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mergecli.runtime.errors import InputError
from mergecli.runtime.progress import Progress
from mergecli.storage.cache import KINDS, entries
from mergecli.storage.checksums import KEY, checksums_of
from mergecli.storage.safetensors_format import read_header
from mergecli.storage.sources import HUBS
from mergecli.storage.store import MANIFEST, manifest_of, size_of

SAMPLE = 10**9
"""Bytes whose digests are compared, at most; of a larger file all of it is, if it is the first."""


class _Check(NamedTuple):
    """A file, and what tells whether it is as it was written."""

    path: Path
    size: int
    wrong: Callable[[], str]
    """What is wrong with it; empty if nothing is."""


@dataclass(frozen=True)
class Health:
    """The files of one place."""

    folder: Path
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """Kind -> how many, and their bytes."""
    files: int = 0
    """Files that have a digest."""
    checked: int = 0
    """Those of them whose digest was compared."""
    unfinished: int = 0
    """Downloads and files that were broken off, which the same command resumes or replaces."""
    damaged: tuple[str, ...] = ()
    """Path and what is wrong with it."""


def store_health(root: Path, progress: Progress | None = None, sample: int = SAMPLE) -> Health:
    """What was fetched: the size of every file, and the SHA-256 of some."""
    kinds: dict[str, tuple[int, int]] = {"models": (0, 0), "data_sets": (0, 0)}
    damaged: list[str] = []
    checks: list[_Check] = []
    unfinished = 0
    for hub in HUBS:
        for folder in sorted((root / hub).glob("**/*.partial")):
            unfinished += folder.is_dir()
        for place in sorted((root / hub).glob(f"**/{MANIFEST}")):
            folder = place.parent
            if folder.name.endswith(".partial"):
                continue
            try:
                files = manifest_of(folder).files.values()
            except InputError:
                damaged.append(f"{place}: cannot be read")
                continue
            kind = "data_sets" if folder.relative_to(root / hub).parts[0] == "datasets" else "models"
            kinds[kind] = kinds[kind][0] + 1, kinds[kind][1] + sum(file.size for file in files)
            for file in files:
                path = folder / file.path
                if (size := size_of(path)) != file.size:
                    found = "is missing" if size is None else f"has {size:,} bytes, expected {file.size:,}"
                    damaged.append(f"{path}: {found}")
                else:
                    checks.append(_Check(path, file.size, _of_sha256(path, file.sha256)))
    checked, wrong = _compared(checks, sample, progress)
    return Health(root, kinds, len(checks), checked, unfinished, (*damaged, *wrong))


def cache_health(root: Path, progress: Progress | None = None, sample: int = SAMPLE) -> Health:
    """What evaluations and merges keep: the checksums of some of the files."""
    kinds: dict[str, tuple[int, int]] = dict.fromkeys(map(str, KINDS), (0, 0))
    checks: list[_Check] = []
    unfinished = 0
    for entry in entries():
        if entry.path.suffix == ".part":
            unfinished += 1
            continue
        count, size = kinds[entry.kind]
        kinds[entry.kind] = count + 1, size + entry.size
        checks.append(_Check(entry.path, entry.size, _of_checksums(entry.path)))
    checked, wrong = _compared(checks, sample, progress)
    return Health(root, kinds, len(checks), checked, unfinished, tuple(wrong))


def _of_sha256(path: Path, expected: str) -> Callable[[], str]:
    def wrong() -> str:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        return "" if found == expected else "has another SHA-256"

    return wrong


def _of_checksums(path: Path) -> Callable[[], str]:
    def wrong() -> str:
        with path.open("rb") as file:
            _, metadata = read_header(path, file.fileno())
        if KEY not in metadata:
            return "has no checksums"
        return "" if checksums_of(path) == metadata[KEY] else "is damaged"

    return wrong


def _compared(checks: Sequence[_Check], sample: int, progress: Progress | None) -> tuple[int, list[str]]:
    """How many files were compared, drawn at random until there are `sample` bytes, and what is wrong with which."""
    chosen = list(_sampled(checks, sample))
    damaged: list[str] = []
    for done, check in enumerate(chosen, 1):
        try:
            if found := check.wrong():
                damaged.append(f"{check.path}: {found}")
        except InputError as error:
            damaged.append(error.message)
        except FileNotFoundError:
            pass  # it was removed meanwhile
        except OSError as error:
            damaged.append(f"{check.path}: cannot be read: {(error.strerror or '').lower()}")
        if progress:
            progress("comparing digests", done, len(chosen))
    return len(chosen), sorted(damaged)


def _sampled(checks: Sequence[_Check], sample: int) -> Iterator[_Check]:
    total = 0
    for check in random.sample(checks, len(checks)):
        if total and total + check.size > sample:
            continue
        total += check.size
        yield check
