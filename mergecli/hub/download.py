"""Doing what is planned: files in several threads, then each commit put in place."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.hub.client import RemoteFile
from mergecli.hub.resolve import Hubs, Part, is_converted
from mergecli.hub.retry import Patience, in_threads
from mergecli.hub.store import Store, sha256_of, size_of
from mergecli.hub.transfer import download
from mergecli.recipe.lock import Key, LockedFile, key_of
from mergecli.runtime.errors import HubError, InputError, MergecliError
from mergecli.runtime.progress import Progress
from mergecli.storage.atomic import writing

if TYPE_CHECKING:
    from filelock import BaseFileLock


Place = tuple[str, str]
"""A repository and a commit."""


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    failures: Mapping[Key, MergecliError]
    """Why sources failed."""
    arrived: frozenset[tuple[Place, str]]
    """The files that were downloaded: others may meanwhile have come by another program."""


def carry_out(
    parts: Sequence[Part],
    store: Store,
    hubs: Hubs,
    jobs: int,
    stop: threading.Event,
    patience: Patience,
    progress: Progress | None,
) -> Outcome:
    """Downloads what is missing, converts what is pickled, and puts each commit in place as soon as it is whole.

    Each commit is locked first, so that several programs can fetch the same: the others wait, and find it done. The
    locks are taken in one order by all, and the system gives them back when a program ends in whatever way.
    A source that fails does not hold up the others.
    """
    groups = _grouped(parts, store)
    failures: dict[Key, MergecliError] = {}
    arrived: dict[Place, list[LockedFile]] = {key: [] for key in groups}
    with ExitStack() as stack:
        held: dict[Place, BaseFileLock] = {}
        for key, group in sorted(groups.items()):
            held[key] = store.lock(group[0].source, group[0].commit)
            with writing(store.root):
                _acquire(held[key], group[0], patience.note)
            stack.callback(held[key].release)
        left = {key: _missing(group, store) for key, group in groups.items()}
        _check_space(store, sum(file.size for files in left.values() for file in files))
        tasks = [(key, file) for key in groups for file in left[key]]

        def fail(key: Place, error: MergecliError) -> None:
            for part in groups[key]:
                failures.setdefault(key_of(part.need.source), error)

        def finish(key: Place) -> None:
            try:
                _complete(groups[key], arrived[key], store)
                held[key].release()
            except MergecliError as error:
                fail(key, error)

        for key in groups:
            if not left[key]:
                finish(key)
        actions = [
            partial(_fetched, groups[key][0], file, store, hubs, stop, patience, progress)
            for key, file in tasks
        ]
        for number, result in in_threads(actions, jobs, stop):
            key, _ = tasks[number]
            if isinstance(result, LockedFile):
                arrived[key].append(result)
                if len(arrived[key]) == len(left[key]):
                    finish(key)
            elif isinstance(result, MergecliError):
                fail(key, result)
            else:
                raise result
    return Outcome(failures, frozenset((key, file.path) for key in groups for file in arrived[key]))


def place_of(part: Part) -> Place:
    """What parts that share their files have in common."""
    return f"{part.source.kind}:{part.source.is_data}:{part.source.name}", part.commit


def _grouped(parts: Sequence[Part], store: Store) -> dict[Place, list[Part]]:
    """The parts of each commit of each repository, of those that lack anything."""
    found: dict[Place, list[Part]] = {}
    for part in parts:
        if part.missing or not is_converted(part, store):
            found.setdefault(place_of(part), []).append(part)
    return found


def _acquire(lock: BaseFileLock, part: Part, note: Callable[[str], None] | None) -> None:
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        if note:
            note(f"waiting for another fetch of {part.source.name}")
        lock.acquire(poll_interval=0.1)


def _missing(group: Sequence[Part], store: Store) -> list[RemoteFile]:
    """What is missing still, now that nobody else can change it."""
    files = {file.path: file for part in group for file in part.files}
    return [file for file in files.values() if not store.has(group[0].source, group[0].commit, file)]


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


def _fetched(
    part: Part,
    file: RemoteFile,
    store: Store,
    hubs: Hubs,
    stop: threading.Event,
    patience: Patience,
    progress: Progress | None,
) -> LockedFile:
    name = f"{part.source.name} {file.path}"

    def tell(done: int) -> None:
        if progress:
            progress(name, done, file.size)

    folder = store.partial(part.source, part.commit)
    done = download(hubs.of(part.source), part.source, part.commit, file, folder, stop, tell, patience)
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


def _complete(group: Sequence[Part], arrived: list[LockedFile], store: Store) -> None:
    source, commit = group[0].source, group[0].commit
    pickled = {part.converted: part for part in group if not is_converted(part, store)}
    new = [*arrived, *(_convert(part, store) for part in pickled.values())]
    about = next((part.manifest for part in group if part.manifest.listing is not None), group[0].manifest)
    store.complete(source, commit, new, about)


def _convert(part: Part, store: Store) -> LockedFile:
    """The pickled weights as safetensors, beside them in the partial folder."""
    from mergecli.formats.convert import convert

    pickled, converted = part.pickled or "", part.converted or ""
    partial_folder = store.partial(part.source, part.commit)
    whole = store.folder(part.source, part.commit)
    origin = partial_folder / pickled if (partial_folder / pickled).is_file() else whole / pickled
    target = partial_folder / converted
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing(target):
            convert(origin, target, allow_pickle=True)
    except MergecliError as error:
        message = error.message.replace(f"{partial_folder}/", "").replace(f"{whole}/", "")
        raise type(error)(message, error.hint) from error
    return LockedFile(converted, size_of(target) or 0, sha256_of(target), pickled)


def checked(parts: Sequence[Part], store: Store) -> list[str]:
    """A line for every file that is missing, or is not what the lock or else the store's own record says."""
    lines: list[str] = []
    for part in parts:
        folder: Path = store.folder(part.source, part.commit)
        own = part.manifest.files
        used = [*(file.path for file in part.files), *([part.converted] if part.converted else [])]
        # what was made here from a locked pickle says in its metadata which version made it
        locked = {file.path: file for file in part.pinned.files if not file.made_from} if part.pinned else {}
        known = [found for path in used if (found := locked.get(path) or own.get(path))]
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
