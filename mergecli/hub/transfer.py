"""One file from a hub to the disk: resumed, tried again, and kept only if it is what the hub promised.

The hubs' own libraries open the connections: proxies, certificates, tokens and redirects are theirs. The loop that
writes the bytes is ours, because theirs fall short of it: `hf_hub_download` throws a partial file away when it is
interrupted, its `http_get` gives up on status 500 and on a reset connection and holds back blocks of 10 MB, and both it
and ModelScope's downloader sleep through Ctrl-C; the latter also draws its bar into pipes, and fails a file that takes
longer than an hour.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from mergecli.hub.client import Hub, TransientError
from mergecli.hub.retry import RetryPolicy, StoppedError
from mergecli.runtime.errors import HubError
from mergecli.storage.atomic import writing
from mergecli.storage.sources import Source
from mergecli.storage.store import RemoteFile, StoredFile, size_of

_SMALL = 1 << 27
"""Bytes."""
Tell = Callable[[int], None]
"""Called with how many bytes of the file are here."""


def download(
    hub: Hub,
    source: Source,
    commit: str,
    file: RemoteFile,
    folder: Path,
    stop: threading.Event,
    tell: Tell,
    policy: RetryPolicy,
) -> StoredFile:
    """Puts the file under its path in `folder`, unless it is there already; its size and SHA-256 are verified.

    Bytes arrive in `<path>.incomplete`, from which the next try goes on. What turns out wrong is removed; if it began
    in an earlier run, it is fetched once more as a whole.

    Raises:
        HubError: the hub refuses, it was tried too often, or the file is not what the hub promised.
        InputError: it cannot be written.
        StoppedError: the work was given up.
    """
    target = folder / file.path
    incomplete = target.with_name(target.name + ".incomplete")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file():
            target.replace(incomplete)
        resumed = size_of(incomplete) or 0
        while True:
            digest, size = _fill(hub, source, commit, file, incomplete, stop, tell, policy)
            wrong = digest.wrong(size)
            if not wrong:
                incomplete.replace(target)
                return StoredFile(file.path, size, digest.sha256)
            incomplete.unlink()
            if not resumed:
                raise HubError(
                    f"`{file.path}`: {wrong}: the file was removed",
                    "fetch again; if that does not help, the hub or something on the way to it changes files",
                )
            resumed = 0


def content(
    hub: Hub, source: Source, commit: str, file: RemoteFile, stop: threading.Event, policy: RetryPolicy
) -> bytes:
    """What is in a small file, which is not kept; verified, and errors as with `download`."""
    if file.size > _SMALL:
        raise HubError(f"`{file.path}`: expected a small file, and it has {file.size:,} bytes")
    with tempfile.TemporaryDirectory() as folder:
        download(hub, source, commit, file, Path(folder), stop, lambda _: None, policy)
        return (Path(folder) / file.path).read_bytes()


class _Digest:
    """The digests of a file, from its first byte on: SHA-256, and git's where the hub knows only that."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._git = None
        if file.git and not file.sha256:
            self._git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)

    def update(self, block: bytes) -> None:
        self._sha256.update(block)
        if self._git:
            self._git.update(block)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def wrong(self, size: int) -> str:
        """What differs from the hub's promise, or an empty string."""
        file = self._file
        if size != file.size:
            return f"expected {file.size} bytes, got {size}"
        if file.sha256 and self.sha256 != file.sha256:
            return f"expected SHA-256 {file.sha256[:16]}..., got {self.sha256[:16]}..."
        if self._git and file.git != (got := self._git.hexdigest()):
            return f"expected git blob {str(file.git)[:16]}..., got {got[:16]}..."
        return ""


def _fill(
    hub: Hub,
    source: Source,
    commit: str,
    file: RemoteFile,
    path: Path,
    stop: threading.Event,
    tell: Tell,
    policy: RetryPolicy,
) -> tuple[_Digest, int]:
    """Appends to the file until it is as long as it should be; its digests and its size."""
    failures = 0
    digest, done = _Digest(file), 0
    with path.open("ab+", buffering=0) as out:
        if os.fstat(out.fileno()).st_size > file.size:
            out.truncate(0)
        out.seek(0)
        while block := out.read(1 << 20):
            if stop.is_set():
                raise StoppedError
            digest.update(block)
            done += len(block)
        tell(done)
        furthest = (
            done  # only what brings the file further counts as progress: a server may always begin anew
        )
        while done < file.size:
            try:
                with hub.open(source, commit, file.path, done) as body:
                    if body.start != done:
                        out.truncate(body.start)
                        digest, done = _Digest(file), 0
                    for block in body.blocks:
                        if stop.is_set():
                            raise StoppedError
                        _write(out.fileno(), block)
                        digest.update(block)
                        done += len(block)
                        tell(done)
                        if done > furthest:
                            failures, furthest = 0, done
                        if done > file.size:
                            return digest, done
                if done < file.size:
                    raise TransientError(f"the connection ended after {done} of {file.size} bytes")
            except TransientError as reason:
                failures += 1
                policy.pause(failures, reason, stop)
        os.fsync(out.fileno())
    return digest, done


def _write(descriptor: int, block: bytes) -> None:
    left = memoryview(block)
    while left:
        left = left[os.write(descriptor, left) :]
