"""`fetch`: recipes and sources to local paths; the only verb that opens a socket."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mergecli.errors import HubError, InputError, MergecliError, UsageError, did_you_mean, listed
from mergecli.hub.needs import of_recipe, platform_of, sought
from mergecli.hub.patience import Patience, in_threads
from mergecli.hub.plan import Hubs, Part, entry_of, settle, settle_locked, settle_offline
from mergecli.hub.store import Store
from mergecli.hub.wishes import Wishes, gathered
from mergecli.hub.work import carry_out, checked
from mergecli.lock import Key, Lock, key_of, lock_path, write_lock
from mergecli.progress import Progress
from mergecli.recipe import Recipe
from mergecli.sources import Source, home, locate

KINDS = ("models", "data")

Failures = dict[Key, MergecliError]


@dataclass(frozen=True)
class Download:
    """A file that was not in the store."""

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

    Raises:
        HubError: something could not be fetched, or is not in the store and `offline` is set; all that failed is told.
        InputError: with `verify`, files are missing or damaged; or something cannot be written.
        UsageError: an argument is wrong, or `locked` is set and a lock is missing or lacks a source.
    """
    for name in only:
        if name not in KINDS:
            raise UsageError(
                f"--only: expected {' or '.join(KINDS)}, got `{name}`{did_you_mean(name, KINDS)}"
            )
    if jobs < 1:
        raise UsageError(f"--jobs: expected at least 1, got {jobs}")
    where = platform_of(platform)
    given = [sources] if isinstance(sources, str | Path | Recipe) else list(sources)
    wishes = gathered(given, changes, tuple(only) or KINDS, locked, where)
    store = Store(Path(into) if into is not None else home())
    for need in wishes.needs.values():
        store.check(sought(need.source, where))
    offline = offline or verify or _offline_by_environment()
    stop, patience, failures = threading.Event(), Patience(), Failures()
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
    downloads = tuple(
        Download(str(part.need.source), file.path, file.size, hubs.of(part.source).host)
        for part in ordered
        for file in part.missing
    )
    written: tuple[Path, ...] = ()
    if not (dry_run or offline):
        failures |= carry_out(ordered, store, hubs, jobs, stop, patience, progress)
        for key, part in parts.items():
            if key not in failures and not part.pinned:
                store.refer(part.source, part.commit)
    _raise(failures, wishes, offline)
    if not (dry_run or offline or locked):
        written = _write_locks(wishes, parts, store)
    paths = [
        parts[key].path(store)
        if (key := key_of(need.source)) in parts
        else _here(need.source, store, allow_pickle)
        for wish in wishes.each
        for need in wish.needs
    ]
    return Fetched(tuple(dict.fromkeys(paths)), downloads, written)


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


def _here(source: Source, store: Store, allow_pickle: bool) -> Path:
    """Where something lies that no hub has: a toy, or a path, converted if it is in an old format."""
    path = locate(source)
    if source.kind != "path" or source.is_data:
        return path
    from mergecli.hub.local import readable

    return readable(path, store.root, allow_pickle=allow_pickle)


def _offline_by_environment() -> bool:
    """Whether the variables that keep `huggingface_hub` from the network are set; here they keep all from it."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def _raise(failures: Failures, wishes: Wishes, offline: bool) -> None:
    """Raises what went wrong, if anything did: a line for each reason."""
    if not failures:
        return
    worst = next((error for error in failures.values() if not isinstance(error, HubError)), None)
    if worst:
        raise worst
    reasons: dict[str, list[str]] = {}
    for key, error in ((key, failures[key]) for key in wishes.needs if key in failures):
        name = str(wishes.needs[key].source)
        reasons.setdefault(error.message.removeprefix(f"{name}: "), []).append(name)
    lines = [f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}: {reason}"
             for reason, names in reasons.items()]  # fmt: skip
    hints = "; ".join(list(dict.fromkeys(error.hint for error in failures.values() if error.hint))[:2])
    if offline:
        hints = "run `mergecli fetch` where there is a network, without `--offline` and HF_HUB_OFFLINE"
    if len(lines) == 1:
        raise HubError(lines[0], hints)
    raise HubError(f"{len(failures)} of {len(wishes.needs)} sources failed:\n{listed(lines, 50)}", hints)


def _write_locks(wishes: Wishes, parts: dict[Key, Part], store: Store) -> tuple[Path, ...]:
    """The locks of the recipes: what was fetched now, and of what they had before what their recipe still names."""
    written: list[Path] = []
    for wish in wishes.each:
        if not wish.recipe or not wish.recipe.path:
            continue
        entries = [
            entry_of(part, store.manifest(part.source, part.commit).files)
            for need in wish.needs
            if (part := parts.get(key_of(need.source)))
        ]
        named = {key_of(need.source) for need in of_recipe(wish.recipe, KINDS)}
        before = Lock({key: entry for key, entry in (wish.lock or Lock()).entries.items() if key in named})
        lock = before.merged(entries)
        if lock.entries and lock != wish.lock:
            write_lock(lock_path(wish.recipe.path), lock)
            written.append(lock_path(wish.recipe.path))
    return tuple(written)
