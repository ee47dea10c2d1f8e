"""The store as `fetch` writes it: files arrive in `<commit>.partial/`, which takes the commit's name when all are verified."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING

from mergecli.hub.file_selection import LISTED_SUFFIXES
from mergecli.runtime.errors import InputError
from mergecli.storage.atomic import write_text, writing
from mergecli.storage.checksums import checksums_of
from mergecli.storage.sources import DEFAULT_BRANCH, Source
from mergecli.storage.store import MANIFEST, Manifest, Store, StoredFile

if TYPE_CHECKING:
    from filelock import BaseFileLock


def check_names(store: Store, source: Source, *, to_write: bool = True) -> None:
    """Checks what is known of a source before any request.

    Raises:
        UsageError: its name or revision would leave the store.
        InputError: no such path can be, or with `to_write` its revision cannot be written down.
    """
    path = store.reference_file(source)
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        for parent in path.parents:
            if to_write and parent.is_file() and parent.is_relative_to(store.repository(source)):
                raise InputError(f"{parent}: is a file, a folder was expected", "delete it") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"{path}: cannot be used: {reason}", "the store is named by `--into` or MERGECLI_HOME"
        ) from error
    else:
        if to_write and S_ISDIR(kind):
            raise InputError(f"{path}: is a folder, a file was expected", "delete it")


def partial_folder(store: Store, source: Source, commit: str) -> Path:
    """Where the files of a commit arrive."""
    folder = store.folder(source, commit)
    return folder.with_name(f"{folder.name}.partial")


def commit_lock(store: Store, source: Source, commit: str) -> BaseFileLock:
    """The lock of a commit's folders; whoever holds it may change them."""
    from filelock import FileLock

    folder = store.folder(source, commit)
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def write_reference(store: Store, source: Source, commit: str) -> None:
    """Writes down which commit the source's revision is."""
    if (source.revision or DEFAULT_BRANCH[source.kind]) != commit and store.reference(source) != commit:
        path = store.reference_file(source)
        with writing(path):
            write_text(path, commit + "\n")


def put_in_place(
    store: Store, source: Source, commit: str, new: Sequence[StoredFile], about: Manifest
) -> None:
    """Puts verified files, which lie in the partial folder, into the commit's folder.

    A new folder appears all at once. Into one that is there, files go one by one, and the manifest last. Only for whoever
    holds the lock.
    """
    partial, folder = partial_folder(store, source, commit), store.folder(source, commit)
    before = store.manifest(source, commit)
    files = {**before.files, **{file.path: file for file in new}}
    found = {
        file.path: checksums_of(partial / file.path) or ""
        for file in new
        if file.path.endswith(".safetensors")
    }
    text = _manifest_text(commit, files, before, about, {**before.checksums, **found})
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


def add_checksums(store: Store, source: Source, commit: str, found: Mapping[str, str]) -> None:
    """Records checksums of files that are in place. Only for whoever holds the lock."""
    path, before = store.folder(source, commit) / MANIFEST, store.manifest(source, commit)
    with writing(path):
        write_text(path, _manifest_text(commit, before.files, before, before, {**before.checksums, **found}))


def _manifest_text(
    commit: str,
    files: Mapping[str, StoredFile],
    before: Manifest,
    about: Manifest,
    checksums: Mapping[str, str],
) -> str:
    listing = about.listing if about.listing is not None else before.listing
    content = {
        "schema": 1,
        "commit": commit,
        "converted_from": about.converted_from or before.converted_from,
        "files": {path: _without_path(file) for path, file in sorted(files.items())},
        "listing": None
        if listing is None
        else [asdict(file) for file in listing if file.path.endswith(LISTED_SUFFIXES)],
        "checksums": dict(sorted(checksums.items())),
        **({"license": license} if (license := about.license or before.license) else {}),
    }
    return json.dumps(content, indent=1) + "\n"


def _without_path(file: StoredFile) -> dict[str, str | int | None]:
    return {name: value for name, value in asdict(file).items() if name != "path"}


def sha256_of(path: Path, stop: threading.Event | None = None) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while (block := file.read(1 << 20)) and not (stop and stop.is_set()):
            state.update(block)
    return state.hexdigest()
