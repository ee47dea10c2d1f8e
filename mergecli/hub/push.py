"""`push`: a folder with a model to a repository of a hub, as one commit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from mergecli.formats.quantized import dequantized
from mergecli.hub.client import LocalFile, Publisher, Remote, TransientError
from mergecli.hub.fetch import offline_by_environment
from mergecli.hub.requirements import named, parse
from mergecli.hub.retry import RetryPolicy
from mergecli.hub.session import Session
from mergecli.results.card_file import CARD, CardFile
from mergecli.runtime import interrupts
from mergecli.runtime.errors import HubError, InputError, UsageError
from mergecli.runtime.notes import note as remark
from mergecli.runtime.progress import AnyProgress, shown
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.metadata import version
from mergecli.storage.sources import DEFAULT_BRANCH, HUBS, Source
from mergecli.storage.store import Store, home

State = Literal["new", "changed", "same", "removed"]


@dataclass(frozen=True)
class PushedFile:
    """A file of the repository, and what the push does to it."""

    path: str
    size: int
    """Bytes; 0 of a file that is removed."""
    state: State


@dataclass(frozen=True)
class Pushed:
    """What `push` did, or with `dry_run` would do."""

    url: str
    """Where people see it."""
    files: tuple[PushedFile, ...]
    creates: Literal["repository", "branch", ""]
    """What is new besides files."""
    private: bool


def push(
    folder: str | Path,
    target: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    jobs: int = 4,
    token_to_endpoint: bool = False,
    progress: AnyProgress | None = None,
    note: Callable[[str], None] | None = None,
) -> Pushed:
    """Brings a model to a hub: its repository is made if there is none, and gets one commit with what differs.

    All files of the folder are pushed but hidden ones. Other files of the repository stay, but for weights that loaders
    would take for the model's. When a push is interrupted, what has arrived is kept, and the same call goes on.

    Args:
        folder: a model's folder, such as `merge` writes.
        target: `hf:org/name` or `ms:org/name`.
        private: a new repository is private.
        revision: the branch; made if there is none, where the hub lets programs make one.
        dry_run: only find out what would be pushed; nothing is written.
        jobs: files at a time.
        token_to_endpoint: send the hub's token to an endpoint that is not the hub's own.
        note: called with a sentence when the work waits for a hub.

    Raises:
        InputError: the folder has no model, or a damaged one. UsageError: an argument is wrong.
        HubError: there is no token, the hub refuses it, or cannot be reached.
    """
    if jobs < 1:
        raise UsageError(f"--jobs: expected at least 1, got {jobs}")
    source = _target(target, revision)
    paths = _paths(Path(folder))
    if offline_by_environment():
        raise HubError(
            f"{named(source)}: a push needs a network",
            "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it",
        )
    with shown(progress) as report:
        session = Session(Store(home()), RetryPolicy(note=note), jobs, False, token_to_endpoint, report)
        publisher = session.publisher(source)
        publisher.check(source)
        return _push(publisher, source, Path(folder), paths, private, dry_run, session)


def _push(
    publisher: Publisher,
    source: Source,
    folder: Path,
    paths: Sequence[Path],
    private: bool,
    dry_run: bool,
    session: Session,
) -> Pushed:
    license = _license(folder / CARD)
    with publisher.working():
        there = publisher.look(source)
        if private and there is not None and not there.is_private:
            raise HubError(
                f"{named(source)}: is public already, and `--private` is for a new repository",
                "make it private on its page, or choose another name",
            )
        files = _hashed(folder, paths, session)
        changes = _changes(files, there)
        creates = "repository" if there is None else "" if there.commit else "branch"
        is_private = private if there is None else there.is_private
        done = Pushed(publisher.url(source), changes, creates, is_private)
        if not dry_run:
            _send(publisher, source, files, there, done, license, session)
    return done


def _target(text: str, revision: str | None) -> Source:
    """The repository and its branch.

    Raises:
        UsageError: it is none that can be pushed to.
    """
    source = parse(text)
    expected = "expected `hf:org/name` or `ms:org/name`"
    if source.kind not in HUBS:
        raise UsageError(f"`{text}`: {expected}")
    if source.is_data:
        raise UsageError(f"`{text}`: is a data set: {expected}")
    if source.inside or "/" not in source.name:
        raise UsageError(
            f"`{text}`: {expected}", "" if source.inside else "`org` is your user name, or an organization"
        )
    if revision is not None and not revision.strip():
        raise UsageError("--revision: expected a branch, got nothing")
    if revision and source.revision and revision != source.revision:
        raise UsageError(f"--revision {revision}: `{text}` names another", "name it once")
    return replace(source, revision=revision or source.revision)


def _paths(folder: Path) -> list[Path]:
    """The files of a model's folder that are pushed, by name.

    Raises:
        InputError: it is no folder with a whole model.
    """
    if not folder.is_dir():
        what = "is a file, a model's folder was expected" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}", "`mergecli merge -o FOLDER`, without suffix, writes one")
    found = sorted(
        path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder))
    )
    weights = [path for path in found if path.suffix == ".safetensors"]
    if not weights:
        raise InputError(
            f"{folder}: has no safetensors file", "`mergecli merge -o FOLDER`, without suffix, writes a model"
        )
    for path in weights:
        dequantized(open_checkpoint(path)).close()  # what a residual is added to must be pushed with it
    if folder / CARD not in found:
        remark(f"{folder}: has no model card, README.md")
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _hashed(folder: Path, paths: Sequence[Path], session: Session) -> list[LocalFile]:
    found: list[LocalFile] = []
    total, done = sum(path.stat().st_size for path in paths), 0
    for path in paths:
        size = path.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                interrupts.check()
                sha256.update(block)
                git.update(block)
                done += len(block)
                session.report("reading the model", done, total)
        found.append(
            LocalFile(path.relative_to(folder).as_posix(), path, size, sha256.hexdigest(), git.hexdigest())
        )
    return found


def _changes(files: Sequence[LocalFile], there: Remote | None) -> tuple[PushedFile, ...]:
    """What the push does to each file."""
    known = {file.path: file for file in there.files} if there else {}

    def state(file: LocalFile) -> State:
        return "new" if file.path not in known else "same" if file.is_same(known[file.path]) else "changed"

    own = {file.path for file in files}
    stale = [path for path in known if path not in own and _is_stale(path, own)]
    return (
        *(PushedFile(file.path, file.size, state(file)) for file in files),
        *(PushedFile(path, 0, "removed") for path in sorted(stale)),
    )


def _is_stale(path: str, new: set[str]) -> bool:
    """Whether a file at the repository's top has weights in place of which loaders shall find the new ones."""
    weights = path.startswith("model") and path.removesuffix(".index.json").endswith(".safetensors")
    return weights and "/" not in path and any(name.startswith("model") and "/" not in name for name in new)


def _send(
    publisher: Publisher,
    target: Source,
    files: Sequence[LocalFile],
    there: Remote | None,
    plan: Pushed,
    license: str | None,
    session: Session,
) -> None:
    states = {each.path: each.state for each in plan.files}
    sent = [file for file in files if states[file.path] in ("new", "changed")]
    removed = [each.path for each in plan.files if each.state == "removed"]
    if there is None:
        publisher.create(target, private=plan.private, license=license)
    if (there is None or there.commit is None) and target.revision not in (None, DEFAULT_BRANCH[target.kind]):
        publisher.make_branch(target)

    def upload(file: LocalFile) -> None:
        def tell(done: int) -> None:
            session.report(f"{target.name} {file.path}", done, file.size)

        publisher.upload(target, file, tell)

    arrived = 0
    try:
        with interrupts.telling(lambda: f"{arrived} of {len(sent)} files have arrived and are kept"):
            for _, result in session.in_threads(partial(upload, file) for file in sent):
                if isinstance(result, Exception):
                    raise result
                arrived += 1
            if sent or removed:
                publisher.commit(target, sent, removed, f"Pushed by mergecli {version()}")
    except TransientError as error:
        raise HubError(f"{named(target)}: {error.reason}", "try again: what has arrived is kept") from error


def _license(card: Path) -> str | None:
    license = CardFile.read(card).front.get("license")
    return license if isinstance(license, str) else None
