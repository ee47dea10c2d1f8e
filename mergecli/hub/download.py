"""Downloads: files in several threads, then each commit put in place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.hub.resolve import Resolved
from mergecli.hub.session import Session
from mergecli.hub.store import commit_lock, partial_folder, put_in_place, sha256_of
from mergecli.hub.transfer import download
from mergecli.recipe.lock import Key
from mergecli.runtime.errors import HubError, InputError, MergecliError
from mergecli.storage.atomic import writing
from mergecli.storage.store import RemoteFile, Store, StoredFile, size_of

if TYPE_CHECKING:
    from filelock import BaseFileLock


CommitKey = tuple[str, str]
"""A repository and a commit."""


@dataclass(frozen=True)
class Downloads:
    """What came of it."""

    failures: Mapping[Key, MergecliError]
    """Why sources failed."""
    arrived: frozenset[tuple[CommitKey, str]]
    """The files that were downloaded: others may meanwhile have come by another program."""


def download_all(resolved: Sequence[Resolved], session: Session) -> Downloads:
    """Downloads what is missing, converts what is pickled, and puts each commit in place as soon as it is whole.

    Each commit is locked first, so that several programs can fetch the same: the others wait, and find it done. The
    system gives the locks back however a program ends.
    A source that fails does not hold up the others.
    """
    store, groups = session.store, _grouped(resolved, session.store)
    failures: dict[Key, MergecliError] = {}
    arrived: dict[CommitKey, list[StoredFile]] = {key: [] for key in groups}
    with ExitStack() as stack:
        held: dict[CommitKey, BaseFileLock] = {}
        for key, group in sorted(groups.items()):
            # one order for all programs: two that each held what the other waits for would wait for ever
            held[key] = commit_lock(store, group[0].source, group[0].commit)
            with writing(store.root):
                acquire(held[key], group[0], session.policy.note)
            stack.callback(held[key].release)
        left = {key: _missing(group, store) for key, group in groups.items()}
        _check_space(store, sum(file.size for files in left.values() for file in files))
        tasks = [(key, file) for key in groups for file in left[key]]

        def fail(key: CommitKey, error: MergecliError) -> None:
            for each in groups[key]:
                failures.setdefault(each.requirement.key, error)

        def finish(key: CommitKey) -> None:
            try:
                _complete(groups[key], arrived[key], store)
                held[key].release()
            except MergecliError as error:
                fail(key, error)

        for key in groups:
            if not left[key]:
                finish(key)
        actions = [partial(_download, groups[key][0], file, session) for key, file in tasks]
        for number, result in session.in_threads(actions):
            key, _ = tasks[number]
            if isinstance(result, StoredFile):
                arrived[key].append(result)
                if len(arrived[key]) == len(left[key]):
                    finish(key)
            elif isinstance(result, MergecliError):
                fail(key, result)
            else:
                raise result
    return Downloads(failures, frozenset((key, file.path) for key in groups for file in arrived[key]))


def commit_key(resolved: Resolved) -> CommitKey:
    """What those that share their files have in common."""
    source = resolved.source
    return f"{source.kind}:{source.is_data}:{source.name}", resolved.commit


def _grouped(resolved: Sequence[Resolved], store: Store) -> dict[CommitKey, list[Resolved]]:
    """Those of each commit of each repository, of those that lack anything."""
    found: dict[CommitKey, list[Resolved]] = {}
    for each in resolved:
        if each.missing or not each.is_converted(store):
            found.setdefault(commit_key(each), []).append(each)
    return found


def acquire(lock: BaseFileLock, resolved: Resolved, note: Callable[[str], None] | None) -> None:
    """Takes the lock of a commit, after a note if another program has it."""
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        if note:
            note(f"waiting for another fetch of {resolved.source.name}")
        lock.acquire(poll_interval=0.1)


def _missing(group: Sequence[Resolved], store: Store) -> tuple[RemoteFile, ...]:
    """What is missing still, now that nobody else can change it."""
    files = {file.path: file for each in group for file in each.files}
    return store.missing(group[0].source, group[0].commit, files.values())


def _check_space(store: Store, needed: int) -> None:
    if not needed:
        return
    folder = store.root
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < needed:
        raise InputError(
            f"{store.root}: {needed:,} bytes are to be fetched, and the disk has room for {free:,}",
            "free some space, or fetch to another disk with `--into` or MERGECLI_HOME",
        )


def _download(resolved: Resolved, file: RemoteFile, session: Session) -> StoredFile:
    source, commit = resolved.source, resolved.commit
    folder = partial_folder(session.store, source, commit)

    def tell(done: int) -> None:
        session.report(f"{source.name} {file.path}", done, file.size)

    done = download(session.hub(source), source, commit, file, folder, session.stop, tell, session.policy)
    if file.path.endswith(".safetensors"):
        _refuse_pickle(folder / file.path, file.path)
    return done


def _refuse_pickle(file: Path, name: str) -> None:
    """A pickle would be found out only when it is read, and be refused then, whatever it is called."""
    with file.open("rb") as opened:
        start = opened.read(9)
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:] != b"{":
        file.unlink()
        raise HubError(
            f"`{name}`: is a pickle, whatever it is called: the file was removed",
            "name a revision that has safetensors, such as `@refs/pr/1`",
        )


def _complete(group: Sequence[Resolved], arrived: list[StoredFile], store: Store) -> None:
    source, commit = group[0].source, group[0].commit
    pickled = {each.converted: each for each in group if not each.is_converted(store)}
    new = [*arrived, *(_convert(each, store) for each in pickled.values())]
    about = next((each.manifest for each in group if each.manifest.listing is not None), group[0].manifest)
    put_in_place(store, source, commit, new, about)


def _convert(resolved: Resolved, store: Store) -> StoredFile:
    """The pickled weights as safetensors, beside them in the partial folder."""
    from mergecli.formats.convert import convert

    pickled, converted = resolved.pickled or "", resolved.converted or ""
    arriving, whole = partial_folder(store, resolved.source, resolved.commit), resolved.folder(store)
    origin = arriving / pickled if (arriving / pickled).is_file() else whole / pickled
    target = arriving / converted
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing(target):
            convert(origin, target, allow_pickle=True)
    except MergecliError as error:
        message = error.message.replace(f"{arriving}/", "").replace(f"{whole}/", "")
        raise type(error)(message, error.hint) from error
    return StoredFile(converted, size_of(target) or 0, sha256_of(target), pickled)


def damaged(resolved: Sequence[Resolved], store: Store) -> list[str]:
    """A line for every file that is missing, or is not what the lock or else the store's own record says."""
    lines: list[str] = []
    for each in resolved:
        folder, own = each.folder(store), each.manifest.files
        # what was made here from a locked pickle says in its metadata which version made it
        locked = {file.path: file for file in each.locked.files if not file.made_from} if each.locked else {}
        known = [found for path in each.used if (found := locked.get(path) or own.get(path))]
        for file in known:
            path = folder / file.path
            if (size := size_of(path)) is None:
                lines.append(f"{path}: is missing")
            elif size != file.size:
                lines.append(f"{path}: is damaged: expected {file.size} bytes, it has {size}")
            elif sha256_of(path) != file.sha256:
                lines.append(f"{path}: is damaged: its SHA-256 is not {file.sha256[:16]}...")
        if not known:
            lines.append(
                f"{folder}: cannot be checked: it was put there by hand, and no lock says what it was"
            )
    return lines
