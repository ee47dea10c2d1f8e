"""The store: a folder for each repository, in it one for each commit, and `refs/<revision>` files.

`<store>/<hf|ms>/[datasets/]<org>/<name>/<commit>/` is whole when it is there: files arrive in `<commit>.partial/`, which
takes that name when all are verified. `.mergecli.json` in it says size and SHA-256 of every file, and what else the
repository has. Folders put there by hand work too.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING, Any

from mergecli.hub.client import RemoteFile
from mergecli.hub.file_selection import LISTED_SUFFIXES
from mergecli.recipe.lock import LockedFile, is_safe
from mergecli.runtime.errors import HubError, InputError, UsageError
from mergecli.storage.atomic import write_text, writing
from mergecli.storage.sources import DEFAULT_BRANCH, Source

if TYPE_CHECKING:
    from filelock import BaseFileLock

MANIFEST = ".mergecli.json"
COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
"""A whole commit, as git names it."""


@dataclass(frozen=True)
class Manifest:
    """What the store knows of a commit."""

    files: Mapping[str, LockedFile] = field(default_factory=dict[str, LockedFile])
    """Path -> file, of those that are here."""
    listing: tuple[RemoteFile, ...] | None = None
    """All files that the hub has and that could be used; None where nobody asked."""
    converted_from: str | None = None
    """The commit whose data the hub converted to these Parquet files."""


@dataclass(frozen=True)
class Store:
    """A store in the folder `root`."""

    root: Path

    def repository(self, source: Source) -> Path:
        """The folder of all commits of a repository."""
        if not is_safe(source.name):
            raise UsageError(f"source `{source}`: expected `{source.kind}:org/name`")
        return self.root / source.kind / ("datasets" if source.is_data else "") / source.name

    def check(self, source: Source, *, to_write: bool = True) -> None:
        """What can be told of a source before it is looked for.

        Raises:
            UsageError: its name or revision would leave the store.
            InputError: no such path can be, or with `to_write` what the revision is cannot be written down.
        """
        path = self._reference_path(source, source.revision or DEFAULT_BRANCH[source.kind])
        try:
            kind = path.stat().st_mode
        except FileNotFoundError:
            return
        except NotADirectoryError as error:
            for parent in path.parents:
                if to_write and parent.is_file() and parent.is_relative_to(self.repository(source)):
                    raise InputError(f"{parent}: is a file, a folder was expected", "delete it") from error
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError(
                f"{path}: cannot be used: {reason}", "the store is named by `--into` or MERGECLI_HOME"
            ) from error
        else:
            if to_write and S_ISDIR(kind):
                raise InputError(f"{path}: is a folder, a file was expected", "delete it")

    def folder(self, source: Source, commit: str) -> Path:
        """The folder of a commit; there only if it is whole."""
        return self.repository(source) / _checked(source, commit)

    def partial(self, source: Source, commit: str) -> Path:
        """Where the files of a commit arrive."""
        return self.repository(source) / f"{_checked(source, commit)}.partial"

    def lock(self, source: Source, commit: str) -> BaseFileLock:
        """Whoever holds it may change that commit's folders."""
        from filelock import FileLock

        folder = self.repository(source)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f".{_checked(source, commit)}.lock")

    def reference(self, source: Source) -> str | None:
        """The commit that the source's revision was when it was last fetched; a commit is itself."""
        revision = source.revision or DEFAULT_BRANCH[source.kind]
        path = self._reference_path(source, revision)
        try:
            written = path.read_text("utf-8").strip()
        except (OSError, ValueError):
            written = ""
        if _is_folder_name(written):
            return written
        return revision if _is_folder_name(revision) and self.folder(source, revision).is_dir() else None

    def refer(self, source: Source, commit: str) -> None:
        """Writes down what the source's revision is."""
        revision = source.revision or DEFAULT_BRANCH[source.kind]
        if revision != commit and self.reference(source) != commit:
            path = self._reference_path(source, revision)
            with writing(path):
                write_text(path, commit + "\n")

    def _reference_path(self, source: Source, revision: str) -> Path:
        if not is_safe(revision):
            raise UsageError(f"source `{source}`: `{revision}` cannot be a branch, tag or commit")
        return self.repository(source) / "refs" / revision

    def manifest(self, source: Source, commit: str) -> Manifest:
        """What is known of a commit; empty if nothing is."""
        path = self.folder(source, commit) / MANIFEST
        try:
            values: dict[str, Any] = json.loads(path.read_text("utf-8"))
            listing = values["listing"]
            return Manifest(
                {name: LockedFile(name, **each) for name, each in values["files"].items()},
                None if listing is None else tuple(RemoteFile(**each) for each in listing),
                values["converted_from"],
            )
        except (FileNotFoundError, NotADirectoryError):
            return Manifest()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: is damaged", f"delete the folder {path.parent} and fetch again"
            ) from error

    def has(self, source: Source, commit: str, file: RemoteFile) -> bool:
        """Whether the commit's folder has the file, of the right size and once verified."""
        known = self.manifest(source, commit).files.get(file.path)
        if known is None or known.size != file.size or file.sha256 not in (None, known.sha256):
            return False
        return size_of(self.folder(source, commit) / file.path) == file.size

    def complete(self, source: Source, commit: str, new: Sequence[LockedFile], about: Manifest) -> None:
        """Puts verified files, which lie in the partial folder, into the commit's folder: all at once if that is new,
        else one by one, and the manifest last. Only for whoever holds the lock."""
        partial, folder = self.partial(source, commit), self.folder(source, commit)
        before = self.manifest(source, commit)
        files = {**before.files, **{file.path: file for file in new}}
        listing = about.listing if about.listing is not None else before.listing
        content = {
            "schema": 1,
            "commit": commit,
            "converted_from": about.converted_from or before.converted_from,
            "files": {path: _without_path(file) for path, file in sorted(files.items())},
            "listing": None
            if listing is None
            else [asdict(file) for file in listing if file.path.endswith(LISTED_SUFFIXES)],
        }
        text = json.dumps(content, indent=1) + "\n"
        with writing(folder):
            if folder.exists():
                for file in new:
                    target = folder / file.path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    (partial / file.path).replace(target)
                write_text(folder / MANIFEST, text)
                shutil.rmtree(partial, ignore_errors=True)
                return
            for each in [path for path in partial.rglob("*") if path.is_file()]:
                if each.relative_to(partial).as_posix() not in files:
                    each.unlink()
            write_text(partial / MANIFEST, text)
            partial.rename(folder)


def _is_folder_name(commit: str) -> bool:
    return is_safe(commit) and "/" not in commit and commit != "refs" and not commit.endswith(".partial")


def _checked(source: Source, commit: str) -> str:
    """The commit, once it is sure that its folder lies in that of its repository."""
    if not _is_folder_name(commit):
        raise HubError(f"{source}: `{commit}` cannot be a commit")
    return commit


def _without_path(file: LockedFile) -> dict[str, str | int | None]:
    return {name: value for name, value in asdict(file).items() if name != "path"}


def size_of(path: Path) -> int | None:
    """Bytes of a file; None if there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def sha256_of(path: Path, stop: threading.Event | None = None) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while (block := file.read(1 << 20)) and not (stop and stop.is_set()):
            state.update(block)
    return state.hexdigest()
