"""The locks that `fetch` writes beside recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergecli.hub.requirements import KINDS, Requests, of_recipe
from mergecli.hub.resolve import Resolved
from mergecli.recipe.lock import Key, Lock, LockedSource, lock_path, write_lock
from mergecli.storage.atomic import check_name, writing
from mergecli.storage.store import Store


def check_locks(requests: Requests) -> None:
    """Raises UsageError if a lock cannot have the name that it should get."""
    for each in requests.each:
        if each.recipe and each.recipe.path:
            check_name(lock_path(each.recipe.path))


def write_locks(requests: Requests, resolved: Mapping[Key, Resolved], store: Store) -> tuple[Path, ...]:
    """Writes the locks of the recipes: what was fetched now, and of what they had before what their recipe still names.

    Raises:
        InputError: one cannot be written.
    """
    written: list[Path] = []
    for request in requests.each:
        if not request.recipe or not request.recipe.path:
            continue
        found = [resolved[each.key] for each in request.requirements if each.key in resolved]
        named = {each.key for each in of_recipe(request.recipe, KINDS)}
        before = Lock({key: each for key, each in (request.lock or Lock()).sources.items() if key in named})
        lock, path = (
            before.merged(locked_source(each, store) for each in found),
            lock_path(request.recipe.path),
        )
        if lock.sources and lock != request.lock:
            with writing(path, "a lock lies beside its recipe: check the folder's permissions"):
                write_lock(path, lock)
            written.append(path)
    return tuple(written)


def locked_source(resolved: Resolved, store: Store) -> LockedSource:
    """What a lock says of a fetched source."""
    manifest = store.manifest(resolved.source, resolved.commit)
    files = manifest.files
    return LockedSource(
        source=str(resolved.requirement.source),
        is_data=resolved.requirement.source.is_data,
        fetched=f"{resolved.source.kind}:{resolved.source.name}",
        commit=resolved.commit,
        files=tuple(sorted((files[path] for path in resolved.used), key=lambda file: file.path)),
        license=manifest.license,
    )
