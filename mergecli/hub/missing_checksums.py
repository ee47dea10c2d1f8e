"""Checksums for weights that are in the store, and came there before it had any."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from mergecli.hub.download import CommitKey, acquire, commit_key
from mergecli.hub.requirements import named
from mergecli.hub.resolve import Resolved
from mergecli.hub.session import Session
from mergecli.hub.store import add_checksums, commit_lock, sha256_of
from mergecli.recipe.lock import Key
from mergecli.runtime.errors import InputError, MergecliError, quoted
from mergecli.storage.atomic import writing
from mergecli.storage.checksums import checksums_of
from mergecli.storage.store import StoredFile


@dataclass(frozen=True)
class _Weights:
    """A file that lacks checksums."""

    of: Resolved
    file: StoredFile
    hub_knows: bool
    """Whether the hub gives its SHA-256, and not only the store, which found it when the file arrived."""


def add_missing_checksums(resolved: Mapping[Key, Resolved], session: Session) -> dict[Key, MergecliError]:
    """Records checksums of those weights that have none, once each was found to be what was fetched; a note says so.

    A store that cannot be written stays as it is.

    Returns:
        Why some have none still: they are damaged.
    """
    lacking = {
        (commit_key(each.of), each.file.path): each
        for one in resolved.values()
        for each in _lacking(one, session)
    }
    failures: dict[Key, MergecliError] = {}
    found: dict[CommitKey, dict[str, str]] = {}
    every = list(lacking.values())
    actions = [partial(_checksums, each, session) for each in every]
    for count, (number, result) in enumerate(session.in_threads(actions), 1):
        one = every[number].of
        if isinstance(result, str):
            found.setdefault(commit_key(one), {})[every[number].file.path] = result
        elif isinstance(result, MergecliError):
            failures |= {key: result for key, each in resolved.items() if commit_key(each) == commit_key(one)}
        else:
            raise result
        session.report("reading what has no checksums", count, len(every))
    for key, texts in found.items():
        one = next(each.of for each in every if commit_key(each.of) == key)
        lock = commit_lock(session.store, one.source, one.commit)
        with writing(session.store.root):
            acquire(lock, one, session.policy.note)
        try:
            add_checksums(session.store, one.source, one.commit, texts)
        finally:
            lock.release()
    done = [each for (key, path), each in lacking.items() if path in found.get(key, {})]
    if done and session.policy.note:
        session.policy.note(_said(done))
    return failures


def _lacking(resolved: Resolved, session: Session) -> list[_Weights]:
    folder = resolved.folder(session.store)
    manifest = session.store.manifest(resolved.source, resolved.commit)
    if not os.access(folder, os.W_OK):
        return []
    promised = {file.path for file in manifest.listing or () if file.sha256}
    return [
        _Weights(resolved, file, file.path in promised)
        for path in resolved.used
        if path.endswith(".safetensors")
        and path not in manifest.checksums
        and (file := manifest.files.get(path))
        and (folder / path).is_file()
    ]


def _checksums(weights: _Weights, session: Session) -> str:
    path, file = weights.of.folder(session.store) / weights.file.path, weights.file
    if sha256_of(path, session.stop) != file.sha256:
        raise InputError(
            f"{path}: is damaged: its SHA-256 is not {file.sha256[:16]}...",
            f"delete what is damaged, then run `mergecli fetch {named(weights.of.requirement.source)}`",
        )
    return checksums_of(path) or ""


def _said(done: list[_Weights]) -> str:
    names = quoted(dict.fromkeys(str(each.of.source) for each in done), 3)
    count, arrived = len(done), sum(not each.hub_knows for each in done)
    origin = "the hub gives"
    if arrived == count:
        origin = "was found when they came: the hub gives none"
    elif arrived:
        origin = f"the hub gives, or which was found when they came ({arrived}, of which it gives none)"
    return (
        f"{names}: files of weights that came before the store had checksums have them now ({count}); "
        f"their SHA-256 is still the one that {origin}"
    )
