"""A data folder: which files belong to which split, and the digest of their contents."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from array import array
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path, PurePath
from typing import NamedTuple

from mergecli.runtime.errors import InputError, quoted
from mergecli.storage.cache import allowed_size, cache_path, kept, make_room, touch
from mergecli.storage.file_state import expect_unchanged, state_in
from mergecli.storage.safetensors_writer import SafetensorsWriter

VALIDATION_NAMES = ("validation", "valid", "val", "dev")

_NAMES = ("train", "test", *VALIDATION_NAMES)
_SHARD = re.compile(r"[-_]?\d+(-of-\d+)?(-[0-9a-f]{16})?$")


def split_of(path: PurePath) -> tuple[str, PurePath]:
    """The split of `test-00000-of-00002.parquet`, `test.parquet` or `test/0.parquet`, and the folder around it, which
    says of which configuration it is."""
    split, folder = _SHARD.sub("", path.stem), path.parent
    if not split or (split not in _NAMES and folder.name in _NAMES):
        return folder.name or "test", folder.parent
    return split, folder


LARGE = 16 << 20
"""The digest of files that have so many bytes together is remembered, and not computed again while they stay untouched."""
_SETTLED = 5.0
"""Seconds after a change of a file from which on another change is sure to give it another time of change."""

_OF = re.compile(r"[-_](\d+)-of-(\d+)(-[0-9a-f]{16})?$")


def check_shards(files: Sequence[Path], where: str) -> None:
    """Raises InputError if shards of a split are missing, are there twice, or have several totals."""
    numbers: dict[Path, tuple[int, int]] = {}
    for file in files:
        if found := _OF.search(file.stem):
            numbers[file] = (int(found[1]), int(found[2]))
    if not numbers:
        return
    if other := [file.name for file in files if file not in numbers]:
        raise InputError(
            f"{where}: has {quoted(file.name for file in numbers)}, and beside these shards {quoted(other)}",
            "take away what is not of the split",
        )
    if len(totals := {total for _, total in numbers.values()}) > 1:
        named = [
            next(file.name for file, (_, each) in numbers.items() if each == total)
            for total in sorted(totals)
        ]
        raise InputError(
            f"{where}: its shards are of {len(totals)} totals: {quoted(named)}",
            "they are from different versions of the data: keep the files of one",
        )
    (total,) = totals
    held: dict[int, str] = {}
    for file, (number, _) in numbers.items():
        if number in held:
            raise InputError(
                f"{where}: shard {number} is there twice: {quoted([held[number], file.name])}",
                "keep one of them",
            )
        held[number] = file.name
    first = 1 if 0 not in held and total in held else 0
    if missing := [number for number in range(first, first + total) if number not in held]:
        width = max(len(found[1]) for file in files if (found := _OF.search(file.stem)))
        names = [f"-{number:0{width}}-of-{total:0{width}}" for number in missing]
        raise InputError(
            f"{where}: has {len(held)} of {total} shards; {quoted(names)} {'is' if len(names) == 1 else 'are'} missing",
            f"put {'it' if len(names) == 1 else 'them'} beside `{next(iter(held.values()))}`, or fetch the data again",
        )


class Fingerprint(NamedTuple):
    """What data are, and what their files were when that was found out."""

    digest: str
    states: Sequence[int]
    """As `mergecli.storage.file_state` has them: what is read of a file later belongs to the digest if it has the same."""


def fingerprint(files: Sequence[Path], with_names: bool, remember: bool = True) -> Fingerprint:
    """The digest of the files' contents, in order; `with_names` of their folders' names too, which are the classes.

    With `remember` the digest of large files is kept in the cache, and found there as long as the files have the same inode,
    size and times of change.

    Raises:
        InputError: a file changes meanwhile.
    """
    statuses = [file.stat() for file in files]
    states = array("q", map(state_in, statuses))
    return Fingerprint(_digest(files, statuses, states, with_names, remember), states)


def _digest(
    files: Sequence[Path],
    statuses: Sequence[os.stat_result],
    states: Sequence[int],
    with_names: bool,
    remember: bool,
) -> str:
    seen = _untouched(files, statuses, with_names) if remember else None
    place = None if seen is None else cache_path("digests", sha256(seen.encode()).hexdigest()[:32])
    if place is not None:
        known = kept(place, "the files are hashed", lambda stored: stored.metadata["digest"])
        if known is not None:
            touch(place)
            return known
    found = sha256_digest(*_lines(files, states, with_names))
    if place is not None and make_room(1 << 10, allowed_size()):
        about = {"what": f"the digest of {len(files)} files in {files[0].parent.name}", "digest": found}
        with contextlib.suppress(InputError, OSError), SafetensorsWriter(place, {}, about, checked=True):
            pass
    return found


def _untouched(files: Sequence[Path], statuses: Sequence[os.stat_result], with_names: bool) -> str | None:
    """A text that changes when the files do; None if they are small, or were changed just now."""
    latest = max(max(each.st_mtime, each.st_ctime) for each in statuses)
    if sum(each.st_size for each in statuses) < LARGE or not latest < time.time() - _SETTLED:
        return None
    facts = [
        [str(file.absolute()), each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns]
        for file, each in zip(files, statuses, strict=True)
    ]
    return json.dumps([with_names, facts])


def _lines(files: Sequence[Path], states: Sequence[int], with_names: bool) -> list[str]:
    """A line with the digest of each file."""
    import xxhash

    lines: list[str] = []
    for file, before in zip(files, states, strict=True):
        hashed = xxhash.xxh3_128()
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                hashed.update(block)
            expect_unchanged(file, before, stream.fileno())
        lines.append(f"{file.parent.name if with_names else ''} {hashed.hexdigest()}\n")
    return lines


def sha256_digest(*parts: str) -> str:
    """32 hex digits of the SHA-256 of the texts, one after another.

    Its label says `xxh3:`, which is the hash of the single files whose digests are in the texts; the label stands in results
    and in the metadata of merges, where it cannot change.
    """
    return "xxh3:" + sha256("".join(parts).encode()).hexdigest()[:32]
