"""`fetch`: recipes and sources to local paths; the only verb that opens a socket."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mergecli.formats.convert import make, place
from mergecli.hub.download import carry_out, checked, place_of
from mergecli.hub.resolve import Hubs, Part, settle, settle_locked, settle_offline
from mergecli.hub.retry import Patience, in_threads
from mergecli.hub.store import Store
from mergecli.hub.wanted import KINDS, Wishes, gathered, named, of_recipe, platform_of, sought
from mergecli.recipe.lock import Entry, Key, Lock, LockedFile, key_of, lock_path, write_lock
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import HubError, InputError, MergecliError, UsageError, did_you_mean, listed
from mergecli.runtime.progress import Progress
from mergecli.storage.atomic import check_target, writing
from mergecli.storage.sources import HUBS
from mergecli.storage.store import home, locate


def raise_failures(failures: Mapping[Key, MergecliError], wishes: Wishes, offline: bool) -> None:
    """Raises what went wrong, if anything did: a line for each reason, whatever kinds of error they are."""
    if not failures:
        return
    reasons: dict[str, list[str]] = {}
    for key, error in ((key, failures[key]) for key in wishes.needs if key in failures):
        name = named(wishes.needs[key].source)
        reasons.setdefault(error.message.removeprefix(f"{name}: "), []).append(name)
    lines = [f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}: {reason}"
             for reason, names in reasons.items()]  # fmt: skip
    errors = list(failures.values())
    kind = next(
        (kind for kind in (UsageError, InputError) for each in errors if isinstance(each, kind)), HubError
    )
    hints = "; ".join(list(dict.fromkeys(error.hint for error in errors if error.hint))[:2])
    if offline and kind is HubError:
        hints = "run `mergecli fetch` where there is a network, without `--offline` and HF_HUB_OFFLINE"
    if len(lines) == 1:
        raise kind(lines[0], hints)
    raise kind(f"{len(failures)} of {len(wishes.needs)} sources failed:\n{listed(lines, 50)}", hints)


def check_locks(wishes: Wishes) -> None:
    """Raises UsageError if a lock cannot have the name that it should get."""
    for wish in wishes.each:
        if wish.recipe and wish.recipe.path:
            check_target(lock_path(wish.recipe.path))


def write_locks(wishes: Wishes, parts: Mapping[Key, Part], store: Store) -> tuple[Path, ...]:
    """The locks of the recipes: what was fetched now, and of what they had before what their recipe still names.

    Raises:
        InputError: one cannot be written.
    """
    written: list[Path] = []
    for wish in wishes.each:
        if not wish.recipe or not wish.recipe.path:
            continue
        entries = [
            entry_of(part, store.manifest(part.source, part.commit).files)
            for need in wish.needs
            if (part := parts.get(key_of(need.source)))
        ]
        known = {key_of(need.source) for need in of_recipe(wish.recipe, KINDS)}
        before = Lock({key: entry for key, entry in (wish.lock or Lock()).entries.items() if key in known})
        lock, path = before.merged(entries), lock_path(wish.recipe.path)
        if lock.entries and lock != wish.lock:
            with writing(path, "a lock lies beside its recipe: check the folder's permissions"):
                write_lock(path, lock)
            written.append(path)
    return tuple(written)


def entry_of(part: Part, files: Mapping[str, LockedFile]) -> Entry:
    """What a lock says of a fetched part."""
    used = [*(file.path for file in part.files), *([part.converted] if part.converted else [])]
    return Entry(
        source=str(part.need.source),
        is_data=part.need.source.is_data,
        fetched=f"{part.source.kind}:{part.source.name}",
        commit=part.commit,
        files=tuple(sorted((files[path] for path in used), key=lambda file: file.path)),
    )


Failures = dict[Key, MergecliError]


@dataclass(frozen=True)
class Download:
    """A file that was not in the store, and that this process brought there."""

    source: str
    path: str
    """Inside its repository."""
    size: int
    """Bytes."""
    host: str
    """Where it comes from."""


@dataclass(frozen=True)
class Fetched:
    """What `fetch` did, or with `dry_run` would do."""

    paths: tuple[Path, ...]
    """Where each source lies, in order and without repetition."""
    downloads: tuple[Download, ...] = ()
    locks: tuple[Path, ...] = ()
    """The lock files that were written."""


class LockNotWrittenError(InputError):
    """Everything was fetched, and only a lock could not be written; `done` is what was fetched."""

    def __init__(self, message: str, hint: str, done: Fetched) -> None:
        super().__init__(message, hint)
        self.done = done


def fetch(
    sources: str | Path | Recipe | Sequence[str | Path | Recipe],
    *,
    into: str | Path | None = None,
    only: Sequence[str] = (),
    locked: bool = False,
    offline: bool = False,
    verify: bool = False,
    dry_run: bool = False,
    platform: str | None = None,
    jobs: int = 4,
    allow_pickle: bool = False,
    token_to_endpoint: bool = False,
    changes: Sequence[str] = (),
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Fetched:
    """Brings what recipes and sources name to the store, and writes beside each recipe the lock that repeats it.

    Args:
        sources: recipes (objects, or paths that end in `.toml`), and sources: models, `hf:datasets/org/name` for
            data sets, or paths.
        into: the folder of the store, else `MERGECLI_HOME` or `mergecli` in the user's cache folder.
        only: `models`, `data` or both.
        locked: fetch exactly the commits and files of the recipes' locks.
        offline: open no socket; also if the environment has `HF_HUB_OFFLINE=1`.
        verify: only read every file again, and compare it with the lock or else with the store's own record.
        dry_run: only find out what would be fetched; nothing is written.
        platform: `hf` or `ms`: where `hf:` sources are sought.
        jobs: files at a time.
        allow_pickle: fetch and convert pickled weights where there are no others.
        token_to_endpoint: send the hub's token to an endpoint that is not the hub's own.
        changes: changes to the recipes, each `key=value` as for `--set`.
        note: called with a sentence when the work waits for a hub or for another fetch.

    Raises:
        HubError: something could not be fetched, or is not in the store and `offline` is set; all that failed is told.
        InputError: with `verify`, files are missing or damaged; or something cannot be written: a LockNotWrittenError
            if it is only a lock.
        UsageError: an argument is wrong, or `locked` is set and a lock is missing or lacks a source.
    """
    for name in only:
        if name not in KINDS:
            raise UsageError(
                f"--only: expected {' or '.join(KINDS)}, got `{name}`{did_you_mean(name, KINDS)}"
            )
    if jobs < 1:
        raise UsageError(f"--jobs: expected at least 1, got {jobs}")
    if into is not None and not str(into).strip():
        raise UsageError("--into: expected a folder, got nothing")
    where = platform_of(platform)
    given = [sources] if isinstance(sources, str | Path | Recipe) else list(sources)
    wishes = gathered(given, changes, tuple(only) or KINDS, locked, where)
    store = Store(Path(into) if into is not None else home())
    offline = offline or verify or _offline_by_environment()
    fetches = not (dry_run or offline)
    for need in wishes.needs.values():
        store.check(sought(need.source, where), to_write=fetches and not locked)
    if fetches and not locked:
        check_locks(wishes)
    here = _found_here(wishes, store, allow_pickle)
    stop, failures = threading.Event(), Failures()
    patience = Patience(note=note)
    hubs = Hubs(stop, patience, token_to_endpoint)
    actions = [
        partial(_settled, wishes, key, where, store, hubs, locked, offline, verify, allow_pickle)
        for key in wishes.needs
    ]
    parts: dict[Key, Part] = {}
    keys = list(wishes.needs)
    for count, (number, result) in enumerate(in_threads(actions, jobs, stop), 1):
        if isinstance(result, Part):
            parts[keys[number]] = result
        elif isinstance(result, MergecliError):
            failures[keys[number]] = result
        else:
            raise result
        if progress:
            progress("asking what there is", count, len(keys))
    ordered = [parts[key] for key in keys if key in parts]
    if verify and (lines := [*(str(each.message) for each in failures.values()), *checked(ordered, store)]):
        raise InputError(
            f"{len(lines)} of the files that were fetched are not as they were:\n{listed(lines, 50)}",
            "delete what is damaged and fetch again",
        )
    files = {
        (place_of(part), file.path): Download(
            named(part.need.source), file.path, file.size, hubs.of(part.source).host
        )
        for part in reversed(ordered)
        for file in reversed(part.missing)
    }
    if fetches:
        outcome = carry_out(ordered, store, hubs, jobs, stop, patience, progress)
        failures |= outcome.failures
        files = {key: file for key, file in files.items() if key in outcome.arrived}
        for key, part in parts.items():
            if key not in failures and not part.pinned:
                store.refer(part.source, part.commit)
    raise_failures(failures, wishes, offline)
    paths = {key: part.path(store) for key, part in parts.items()}
    for key, (path, target) in here.items():
        if not (dry_run or verify):
            make(path, target)
        paths[key] = target if os.path.exists(target) else path  # noqa: PTH110  a long name
    for key, path in paths.items():
        if not (dry_run or path.exists()):
            name = named(wishes.needs[key].source)
            raise InputError(f"{name}: there is no {path}", "fetch again without `--locked` and `--offline`")
    every = [paths[key_of(need.source)] for wish in wishes.each for need in wish.needs]
    done = Fetched(tuple(dict.fromkeys(every)), tuple(reversed(files.values())))
    if not fetches or locked:
        return done
    try:
        return replace(done, locks=write_locks(wishes, parts, store))
    except InputError as error:
        raise LockNotWrittenError(error.message, error.hint, done) from error


def _found_here(wishes: Wishes, store: Store, allow_pickle: bool) -> dict[Key, tuple[Path, Path]]:
    """Where everything lies that no hub has, toys and paths, and where it can be read: elsewhere if its format is old.

    Raises:
        InputError: it is not there, or damaged. UsageError: it is a pickle, and may not be opened.
    """
    found: dict[Key, tuple[Path, Path]] = {}
    for source in (need.source for wish in wishes.each for need in wish.needs):
        if source.kind in HUBS:
            continue
        path = target = locate(source)
        if source.kind == "path" and not source.is_data:
            target = place(path, store.root, allow_pickle=allow_pickle)
        found[key_of(source)] = path, target
    return found


def _settled(
    wishes: Wishes,
    key: Key,
    platform: str | None,
    store: Store,
    hubs: Hubs,
    locked: bool,
    offline: bool,
    verify: bool,
    allow_pickle: bool,
) -> Part:
    """One need, settled in the way that was asked for."""
    need, entry = wishes.needs[key], wishes.locked.get(key)
    source = sought(need.source, platform)
    if offline:
        same = entry and (locked or platform is None or entry.origin.kind == source.kind)
        return settle_offline(need, source, entry if same else None, store, whole=not verify)
    if entry and locked:
        return settle_locked(need, entry, store, allow_pickle)
    return settle(need, source, store, hubs, allow_pickle)


def _offline_by_environment() -> bool:
    """Whether the variables that keep `huggingface_hub` from the network are set; here they keep all from it."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")
