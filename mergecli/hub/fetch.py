"""`fetch`: recipes and sources to local paths; one of the two verbs that reach the internet."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mergecli.formats.convert import convert_once, converted_path
from mergecli.hub.download import CommitKey, commit_key, damaged, download_all
from mergecli.hub.locks import check_locks, write_locks
from mergecli.hub.missing_checksums import add_missing_checksums
from mergecli.hub.requirements import KINDS, Requests, gather, named, on_platform, platform_of
from mergecli.hub.resolve import (
    NOT_FETCHED,
    NotInStoreError,
    Resolved,
    resolve,
    resolve_locked,
    resolve_offline,
)
from mergecli.hub.retry import RetryPolicy
from mergecli.hub.session import Session
from mergecli.hub.store import check_names, write_reference
from mergecli.recipe.lock import Key
from mergecli.recipe.schema import Recipe
from mergecli.runtime import interrupts
from mergecli.runtime.errors import HubError, InputError, MergecliError, UsageError, did_you_mean, listed
from mergecli.runtime.progress import AnyProgress, shown
from mergecli.storage.sources import HUBS
from mergecli.storage.store import Store, home, locate

Failures = dict[Key, MergecliError]


@dataclass(frozen=True)
class Download:
    """A file that was not in the store, and that this process brought there."""

    source: str
    path: str | None
    """Inside its repository; None where only the hub knows which files there are."""
    size: int | None
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
    progress: AnyProgress | None = None,
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
        verify: only read every file again, and compare it with the lock or else with the store's own record. Weights that
            were fetched before the store had checksums get them, here and whenever they are fetched again.
        dry_run: only find out what would be fetched; nothing is written. With `offline` too, what recipes and locks say of it.
        platform: `hf` or `ms`: where `hf:` sources are looked for.
        jobs: files at a time.
        allow_pickle: fetch and convert pickled weights where there are no others.
        token_to_endpoint: send the hub's token to an endpoint that is not the hub's own.
        changes: changes to the recipes, each `key=value` as for `--set`.
        note: called with a sentence when the work waits for a hub or for another fetch.

    Raises:
        HubError: something could not be fetched, or is not in the store and `offline` is set; the message lists all of it.
        InputError: with `verify`, files are missing or damaged; or something cannot be written: a LockNotWrittenError
            if it is only a lock.
        UsageError: an argument is wrong, or `locked` is set and a lock is missing or lacks a source.
    """
    _check_arguments(only, jobs, into)
    how = _How(locked, offline or offline_by_environment(), verify, dry_run, platform_of(platform))
    given = [sources] if isinstance(sources, str | Path | Recipe) else list(sources)
    requests = gather(given, changes, tuple(only) or KINDS, locked, how.platform)
    store = Store(Path(into) if into is not None else home())
    _check_paths(requests, store, how)
    with shown(progress) as report:
        session = Session(store, RetryPolicy(note=note), jobs, allow_pickle, token_to_endpoint, report)
        return _fetch(given, requests, session, how)


def _fetch(given: Sequence[str | Path | Recipe], requests: Requests, session: Session, how: _How) -> Fetched:
    store = session.store
    local = _local_checkpoints(requests, session)
    resolved, failures = _resolve_all(requests, session, how)
    if how.verify:
        _refuse_damage(resolved, failures, store, given)
    files = _missing_files(resolved, session)
    unknown: list[Download] = []
    if how.dry_run:
        unknown = _unknown_files(requests, failures, session, how)
    if how.downloads:
        with interrupts.telling(lambda: f"what has arrived is kept in {store.root}"):
            outcome = download_all(list(resolved.values()), session)
        failures |= outcome.failures
        files = {key: file for key, file in files.items() if key in outcome.arrived}
        for key, each in resolved.items():
            if key not in failures and not each.locked:
                write_reference(store, each.source, each.commit)
    if how.downloads or how.verify:
        whole = {key: each for key, each in resolved.items() if key not in failures}
        failures |= add_missing_checksums(whole, session)
    _raise_failures(failures, requests, how, given)
    done = Fetched(_paths(requests, resolved, local, store, how), (*files.values(), *unknown))
    if not how.writes_locks:
        return done
    try:
        return replace(done, locks=write_locks(requests, resolved, store))
    except InputError as error:
        raise LockNotWrittenError(error.message, error.hint, done) from error


@dataclass(frozen=True)
class _How:
    """What was asked for besides the sources."""

    locked: bool
    offline: bool
    verify: bool
    dry_run: bool
    platform: str | None

    @property
    def asks_hubs(self) -> bool:
        return not (self.offline or self.verify)

    @property
    def downloads(self) -> bool:
        return self.asks_hubs and not self.dry_run

    @property
    def writes_locks(self) -> bool:
        return self.downloads and not self.locked


def _check_arguments(only: Sequence[str], jobs: int, into: str | Path | None) -> None:
    for name in only:
        if name not in KINDS:
            raise UsageError(
                f"--only: expected {' or '.join(KINDS)}, got `{name}`{did_you_mean(name, KINDS)}"
            )
    if jobs < 1:
        raise UsageError(f"--jobs: expected at least 1, got {jobs}")
    if into is not None and not str(into).strip():
        raise UsageError("--into: expected a folder, got nothing")


def offline_by_environment() -> bool:
    """Whether the variables that keep `huggingface_hub` from the network are set; here they keep all from it."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def _check_paths(requests: Requests, store: Store, how: _How) -> None:
    """Refuses what could not be written after the work."""
    for each in requests.requirements.values():
        check_names(store, on_platform(each.source, how.platform), to_write=how.writes_locks)
    if how.writes_locks:
        check_locks(requests)


def _local_checkpoints(requests: Requests, session: Session) -> dict[Key, tuple[Path, Path]]:
    """Where toys and paths lie, which no hub has, and where they can be read: elsewhere if they must be converted.

    Raises:
        InputError: it is not there, or damaged.
        UsageError: it is a pickle, and may not be opened.
    """
    found: dict[Key, tuple[Path, Path]] = {}
    for requirement in (each for request in requests.each for each in request.requirements):
        source = requirement.source
        if source.kind in HUBS:
            continue
        path = target = locate(source)
        if source.kind == "path" and not source.is_data:
            target = converted_path(path, session.store.root, allow_pickle=session.allow_pickle)
        found[requirement.key] = path, target
    return found


def _resolve_all(requests: Requests, session: Session, how: _How) -> tuple[dict[Key, Resolved], Failures]:
    """Everything that hubs are needed for, in order, and why some of it failed; several questions at a time."""
    keys = list(requests.requirements)
    results: dict[Key, Resolved] = {}
    failures = Failures()
    actions = [partial(_resolve, requests, key, session, how) for key in keys]
    for count, (number, result) in enumerate(session.in_threads(actions), 1):
        if isinstance(result, Resolved):
            results[keys[number]] = result
        elif isinstance(result, MergecliError):
            failures[keys[number]] = result
        else:
            raise result
        session.report("asking what there is", count, len(keys))
    return (
        {key: results[key] for key in keys if key in results},
        {key: failures[key] for key in keys if key in failures},
    )


def _resolve(requests: Requests, key: Key, session: Session, how: _How) -> Resolved:
    """One requirement, in the way that was asked for."""
    requirement, locked = requests.requirements[key], requests.locked.get(key)
    source = on_platform(requirement.source, how.platform)
    if locked and how.locked and how.asks_hubs:
        return resolve_locked(requirement, locked, session.store, session.allow_pickle)
    if how.asks_hubs:
        return resolve(requirement, source, session)
    if locked and not how.locked and how.platform and locked.origin.kind != source.kind:
        locked = None  # what the lock has comes from another platform than the one asked for
    return resolve_offline(requirement, source, locked, session.store, whole=not (how.verify or how.dry_run))


def _refuse_damage(
    resolved: Mapping[Key, Resolved], failures: Failures, store: Store, given: Sequence[str | Path | Recipe]
) -> None:
    """Raises InputError with what was not fetched, or is not as it was fetched."""
    command = _command(given)
    absent = [each.message for each in failures.values()]
    lines = damaged(list(resolved.values()), store)
    if absent and not resolved:
        names = ", ".join(_written(each) for each in given)
        raise InputError(
            f"{names}: nothing has been fetched, so there is nothing to verify", f"run {command}"
        )
    parts: list[str] = []
    if absent:
        parts.append(
            f"{len(absent)} of {len(absent) + len(resolved)} sources cannot be verified:\n{listed(absent, 50)}"
        )
    if lines:
        what = "file is" if len(lines) == 1 else "files are"
        parts.append(f"{len(lines)} {what} not as fetched:\n{listed(lines, 50)}")
    if parts:
        raise InputError(
            "\n".join(parts), f"delete what is damaged, then run {command}" if lines else f"run {command}"
        )


def _command(given: Sequence[str | Path | Recipe]) -> str:
    """The command that fetches what was given."""
    return f"`mergecli fetch {shlex.join(map(_written, given))}`"


def _written(given: str | Path | Recipe) -> str:
    return str((given.path or "RECIPE") if isinstance(given, Recipe) else given)


def _unknown_files(requests: Requests, failures: Failures, session: Session, how: _How) -> list[Download]:
    """Takes those sources out of the failures that are not in the store: what would be fetched of them the hub knows."""
    absent = [key for key, error in failures.items() if isinstance(error, NotInStoreError)]
    found: list[Download] = []
    for key in absent:
        del failures[key]
        source = requests.requirements[key].source
        found.append(Download(named(source), None, None, session.hub(on_platform(source, how.platform)).host))
    return found


def _missing_files(
    resolved: Mapping[Key, Resolved], session: Session
) -> dict[tuple[CommitKey, str], Download]:
    """What has to be downloaded, each file once, under the name of the first source that needs it."""
    files: dict[tuple[CommitKey, str], Download] = {}
    for each in resolved.values():
        for file in each.missing:
            name, host = named(each.requirement.source), session.hub(each.source).host
            files.setdefault((commit_key(each), file.path), Download(name, file.path, file.size, host))
    return files


def _raise_failures(
    failures: Failures, requests: Requests, how: _How, given: Sequence[str | Path | Recipe]
) -> None:
    """Raises what went wrong, if anything did: a line for each reason, whatever kinds of error they are."""
    if not failures:
        return
    reasons: dict[str, list[str]] = {}
    for key in requests.requirements:
        if error := failures.get(key):
            name = named(requests.requirements[key].source)
            reasons.setdefault(error.message.removeprefix(f"{name}: "), []).append(name)
    lines = [f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}: {reason}"
             for reason, names in reasons.items()]  # fmt: skip
    errors = list(failures.values())
    kind = next(
        (kind for kind in (UsageError, InputError) for each in errors if isinstance(each, kind)), HubError
    )
    hints = "; ".join(list(dict.fromkeys(error.hint for error in errors if error.hint))[:2])
    if kind is HubError and not how.asks_hubs:
        hints = f"run {_command(given)} where there is a network, without `--offline` and HF_HUB_OFFLINE"
    elif kind is HubError and how.dry_run:
        hints = "; ".join([hints, "`--offline` shows what the recipe and its lock say"]).removeprefix("; ")
    if len(reasons) == 1 and len(failures) > 4:
        ((reason, names),) = reasons.items()
        what = "have not been fetched" if reason == NOT_FETCHED else f"failed: {reason}"
        raise kind(
            f"{len(names)} of {len(requests.requirements)} sources {what}:\n{listed(names, 50)}", hints
        )
    if len(lines) == 1:
        raise kind(lines[0], hints)
    raise kind(f"{len(failures)} of {len(requests.requirements)} sources failed:\n{listed(lines, 50)}", hints)


def _paths(
    requests: Requests,
    resolved: Mapping[Key, Resolved],
    local: Mapping[Key, tuple[Path, Path]],
    store: Store,
    how: _How,
) -> tuple[Path, ...]:
    """Where each source can be read, in order and without repetition. What needs it is converted: local pickles, and
    models with open_clip's names or configuration, local or of a hub."""
    paths = {key: each.path(store) for key, each in resolved.items()} | {
        key: path for key, (path, _) in local.items()
    }
    for key, path in paths.items():
        if not (how.dry_run or path.exists()):
            name = named(requests.requirements[key].source)
            raise InputError(f"{name}: there is no {path}", "fetch again without `--locked` and `--offline`")
    targets = {key: target for key, (_, target) in local.items()}
    if not (how.dry_run or how.verify):
        for key, each in resolved.items():
            # what is damaged is fetched as it is; whatever opens it says so
            with suppress(InputError, UsageError):
                if not each.source.is_data:
                    targets[key] = converted_path(paths[key], store.root, allow_pickle=False)
        for key, target in targets.items():
            convert_once(paths[key], target)
    for key, target in targets.items():
        if os.path.exists(target):  # noqa: PTH110  a long name
            paths[key] = target
    keys = [each.key for request in requests.each for each in request.requirements]
    every = [paths[key] for key in keys if key in paths]  # without what only the hub knows, in a dry run
    return tuple(dict.fromkeys(every))
