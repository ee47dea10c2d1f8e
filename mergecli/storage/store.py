"""Where sources lie on disk: paths, toys, and what `fetch` brought to the store.

The store has a folder for each repository, in it one for each commit, and `refs/<revision>` files that hold the commit
which a branch or tag stood for when it was fetched. `<store>/<hf|ms>/[datasets/]<org>/<name>/<commit>/` is whole when it is
there; `.mergecli.json` in it says size and SHA-256 of every file, and what else the repository has. Folders put there by
hand work too. `mergecli.hub.store` writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mergecli.runtime.errors import HubError, InputError, UsageError, did_you_mean, nearest, quoted
from mergecli.storage.sources import DEFAULT_BRANCH, HUBS, Source, is_safe

MANIFEST = ".mergecli.json"
TOY_MODELS = Path(__file__).parents[1] / "data" / "toy" / "models"


@dataclass(frozen=True)
class RemoteFile:
    """One file that a hub lists at a commit."""

    path: str
    """With `/` between names."""
    size: int
    """Bytes."""
    sha256: str | None = None
    """The digest that the hub promises; hubs know it of large files (git LFS), ModelScope of all."""
    git: str | None = None
    """SHA-1 of the file as a git blob, where the hub knows no SHA-256."""


@dataclass(frozen=True)
class StoredFile:
    """One file of a repository, as it was verified."""

    path: str
    """With `/` between names."""
    size: int
    """Bytes."""
    sha256: str
    made_from: str | None = None
    """The pickled file that it was converted from; None if it is the hub's own."""


@dataclass(frozen=True)
class Manifest:
    """What the store knows of a commit."""

    files: Mapping[str, StoredFile] = field(default_factory=dict[str, StoredFile])
    """Path -> file, of those that are here."""
    listing: tuple[RemoteFile, ...] | None = None
    """All files that the hub has and that could be used; None where nobody asked."""
    converted_from: str | None = None
    """The commit whose data the hub converted to these Parquet files."""
    checksums: Mapping[str, str] = field(default_factory=dict[str, str])
    """Path -> checksums of the weights in it, as `mergecli.storage.checksums` has them; empty where it can have none."""
    license: str | None = None
    """What the hub gives as the repository's license; None where it does not say."""


def home() -> Path:
    """The folder of the store: `MERGECLI_HOME`, else `mergecli` in the user's cache folder."""
    if own := os.environ.get("MERGECLI_HOME"):
        return Path(os.path.expanduser(own))  # noqa: PTH111
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache or os.path.expanduser("~/.cache")) / "mergecli"  # noqa: PTH111


def cache_folder() -> Path:
    """The folder of the cache: `MERGECLI_CACHE`, else `cache` in the store."""
    own = os.environ.get("MERGECLI_CACHE")
    return Path(os.path.expanduser(own)) if own else home() / "cache"  # noqa: PTH111


@dataclass(frozen=True)
class Store:
    """The store in the folder `root`, as it is read."""

    root: Path

    def repository(self, source: Source) -> Path:
        """The folder of all commits of a repository.

        Raises:
            UsageError: its name would leave the store.
        """
        if not is_safe(source.name):
            raise UsageError(f"source `{source}`: expected `{source.kind}:org/name`")
        return self.root / source.kind / ("datasets" if source.is_data else "") / source.name

    def folder(self, source: Source, commit: str) -> Path:
        """The folder of a commit; there only if it is whole.

        Raises:
            HubError: it is no commit, and its folder would leave that of the repository.
        """
        if not is_folder_name(commit):
            raise HubError(f"{source}: `{commit}` cannot be a commit")
        return self.repository(source) / commit

    def reference_file(self, source: Source) -> Path:
        """The file that holds the commit which the source's revision stood for.

        Raises:
            UsageError: the revision would leave the store.
        """
        revision = source.revision or DEFAULT_BRANCH[source.kind]
        if not is_safe(revision):
            raise UsageError(f"source `{source}`: `{revision}` cannot be a branch, tag or commit")
        return self.repository(source) / "refs" / revision

    def reference(self, source: Source) -> str | None:
        """The commit that the source's revision was when it was last fetched; a commit is itself."""
        try:
            written = self.reference_file(source).read_text("utf-8").strip()
        except (OSError, ValueError):
            written = ""
        if is_folder_name(written):
            return written
        revision = source.revision or DEFAULT_BRANCH[source.kind]
        return revision if is_folder_name(revision) and self.folder(source, revision).is_dir() else None

    def manifest(self, source: Source, commit: str) -> Manifest:
        """What is known of a commit; empty if nothing is.

        Raises:
            InputError: the manifest is damaged, or of another version.
        """
        return manifest_of(self.folder(source, commit))

    def missing(self, source: Source, commit: str, files: Iterable[RemoteFile]) -> tuple[RemoteFile, ...]:
        """Those of the files that the commit's folder does not have, of the right size and once verified."""
        folder, known = self.folder(source, commit), self.manifest(source, commit).files

        def is_there(file: RemoteFile) -> bool:
            stored = known.get(file.path)
            if stored is None or stored.size != file.size or file.sha256 not in (None, stored.sha256):
                return False
            return size_of(folder / file.path) == file.size

        return tuple(file for file in files if not is_there(file))


def manifest_of(folder: Path) -> Manifest:
    """What is known of the commit in a folder of the store; empty if nothing is.

    Raises:
        InputError: the manifest is damaged, or of another version.
    """
    return _manifest(folder / MANIFEST)


def _manifest(path: Path) -> Manifest:
    """What a manifest says; an empty one if there is no such file. Raises InputError if it is damaged."""
    try:
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
        listing = values["listing"]
        return Manifest(
            {name: StoredFile(name, **each) for name, each in values["files"].items()},
            None if listing is None else tuple(RemoteFile(**each) for each in listing),
            values["converted_from"],
            {str(name): str(text) for name, text in values.get("checksums", {}).items()},
            None if values.get("license") is None else str(values["license"]),
        )
    except (FileNotFoundError, NotADirectoryError):
        return Manifest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is damaged", f"delete the folder {path.parent} and fetch again") from error


class RecordedChecksums(NamedTuple):
    """What the store recorded of a fetched file when it was verified."""

    text: str
    """As `mergecli.storage.checksums` has them."""
    cure: str
    """What to do if the file is damaged."""


def recorded_checksums(file: Path) -> RecordedChecksums | None:
    """The checksums of a file that lies in the folder of a fetched commit; None if none are known."""
    for folder in file.absolute().parents[:_DEPTH]:
        manifest = folder / MANIFEST
        try:
            if not manifest.is_file():
                continue
            text = _manifest(manifest).checksums.get(file.absolute().relative_to(folder).as_posix())
        except (InputError, OSError):
            return None
        return RecordedChecksums(text, f"delete the folder {folder} and fetch again") if text else None
    return None


_DEPTH = 4
"""Folders above a file, at most, that may be that of its commit."""


def is_folder_name(commit: str) -> bool:
    """Whether a commit may be the name of a folder in that of its repository."""
    return is_safe(commit) and "/" not in commit and commit != "refs" and not commit.endswith(".partial")


def size_of(path: Path) -> int | None:
    """Bytes of a file; None if there is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


MODEL_SUFFIXES = ("", ".safetensors", ".toml", ".pt", ".bin", ".ckpt")
"""What names of models and recipes end in."""


class NotFetchedError(InputError):
    """A hub's source that is not in the store."""

    def __init__(self, source: Source) -> None:
        name = str(source).replace(":", ":datasets/", 1) if source.is_data else str(source)
        locked = source.pinned and (source.pinned.revision or "")[:12]
        which = f"commit {locked}, which its lock names, " if locked else ""
        hint = f"`mergecli fetch {name}` brings what is missing; it needs a network"
        super().__init__(f"{name}: {which}has not been fetched", hint)
        self.source = source


def locate(source: Source) -> Path:
    """The file or folder on disk that holds the source.

    Raises:
        InputError: it is not there; the hint says how to get it.
    """
    found = {"path": _path, "toy": _toy}.get(source.kind, _fetched)(source)
    path = found / source.inside if source.inside else found
    if source.inside and source.kind in HUBS:
        path = _conversion(path, found) or path
    if source.inside and not path.exists():
        raise InputError(f"{source}: there is no `{source.inside}` in {found}")
    return path


def _conversion(path: Path, folder: Path) -> Path | None:
    """What `fetch` made of a pickled file of a commit's folder, if it did."""
    try:
        files = _manifest(folder / MANIFEST).files
    except InputError:
        return None
    name = path.relative_to(folder).as_posix()
    made = [folder / file.path for file in files.values() if file.made_from == name]
    return next((each for each in made if each.is_file()), None)


def _path(source: Source) -> Path:
    path = source.path or Path(source.name)
    if not os.path.exists(path):  # noqa: PTH110  a name that is too long does not exist either
        hub = not path.is_absolute() and source.name.count("/") == 1 and not source.name.startswith(".")
        hint = f"for the hub's model write `hf:{source.name}`" if hub and "." not in path.name else ""
        near = nearest_path(path)
        meant = f" (did you mean `{Path(source.name).with_name(near.name)}`?)" if near else ""
        raise InputError(f"{source.name}: no such file or folder{meant}", hint)
    return path


def nearest_path(path: Path, suffixes: Sequence[str] = MODEL_SUFFIXES) -> Path | None:
    """The file or folder beside a path that does not exist whose name, but for its suffix, is like it; None if none is."""
    try:
        beside = (
            each for each in path.parent.iterdir() if each.name != path.name
        )  # a link to nothing is there
        names = sorted(each.name for each in beside if each.suffix in suffixes)
    except (OSError, ValueError):
        return None
    stems = {Path(name).stem: name for name in names if not name.startswith(".")}
    near = stems.get(path.name) or stems.get(nearest(path.stem, stems, 0.75))
    return path.with_name(near) if near else None


def _toy(source: Source) -> Path:
    path = TOY_MODELS / source.name
    if not path.is_dir():
        known = sorted(folder.name for folder in TOY_MODELS.iterdir() if folder.is_dir())
        raise InputError(
            f"{source}: there is no such toy{did_you_mean(source.name, known)}",
            "the toys are " + ", ".join(f"`toy:{name}`" for name in known),
        )
    return path


def _fetched(source: Source) -> Path:
    store, pinned = Store(home()), source.pinned or source
    commit = store.reference(pinned)
    if commit is None or not (folder := store.folder(pinned, commit)).is_dir():
        raise NotFetchedError(source)
    try:
        files = store.manifest(pinned, commit).files
    except InputError:
        return folder  # put there by hand, or by another version
    if wrong := [path for path, file in files.items() if size_of(folder / path) != file.size]:
        raise InputError(
            f"{source}: {quoted(wrong)} in {folder} {'is' if len(wrong) == 1 else 'are'} missing or not as fetched",
            "delete that folder and fetch again",
        )
    if not source.is_data and (
        damaged := [path for path, file in files.items() if not _is_as_fetched(folder, file)]
    ):
        raise InputError(
            f"{source}: {quoted(damaged)} in {folder} {'is' if len(damaged) == 1 else 'are'} damaged",
            "delete that folder and fetch again",
        )
    return folder


_SMALL = 16 << 20
"""Bytes up to which a configuration or a tokenizer is hashed whenever it is used."""


def _is_as_fetched(folder: Path, file: StoredFile) -> bool:
    """Whether a small file has the SHA-256 that it was fetched with; weights are checked as they are read."""
    if not file.path.endswith((".json", ".txt", ".model")) or file.size > _SMALL:
        return True
    path = folder / file.path
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns) == file.sha256


@lru_cache(maxsize=1024)
def _sha256(path: Path, _size: int, _changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
