"""What a hub offers and takes, and the error for what may work another time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mergecli.storage.sources import Source
from mergecli.storage.store import RemoteFile


@dataclass(frozen=True)
class Body:
    """The bytes of a file, as they arrive."""

    start: int
    """Where in the file they begin: 0 if the server did not go on from where it was asked to."""
    blocks: Iterable[bytes]


class TransientError(Exception):
    """Something that may work when it is tried again; `wait` is how many seconds the hub asks for, if it does."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


class Hub(Protocol):
    """One hub. Sources are repositories: `revision` is a branch, a tag or a commit, and None the default branch.

    Every method raises HubError for what another try would not mend, and TransientError for what it may.
    """

    @property
    def endpoint(self) -> str:
        """The URL of the hub."""
        ...

    @property
    def host(self) -> str:
        """Where requests go: a host name, with its port if that is not the usual one."""
        ...

    def resolve(self, source: Source) -> str:
        """The commit that the revision stands for now; one request, where the hub can say it in one."""
        ...

    def license(self, source: Source) -> str | None:
        """The license that the hub gave when it resolved the source; None where it gave none. No request is made."""
        ...

    def files(self, source: Source, commit: str) -> tuple[RemoteFile, ...]:
        """All files of the repository at the commit."""
        ...

    def open(self, source: Source, commit: str, path: str, start: int) -> AbstractContextManager[Body]:
        """The bytes of a file from `start` on."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file that is to be on a hub."""

    path: str
    """In the repository, with `/` between names."""
    file: Path
    size: int
    """Bytes."""
    sha256: str
    git: str
    """SHA-1 of the file as a git blob."""

    def is_same(self, other: RemoteFile) -> bool:
        """Whether the hub has this content under this name."""
        known = other.sha256 == self.sha256 if other.sha256 else other.git == self.git
        return other.path == self.path and other.size == self.size and known


@dataclass(frozen=True)
class Remote:
    """A repository as it is before a push."""

    is_private: bool
    commit: str | None
    """That the branch stands for; None if there is no such branch."""
    files: tuple[RemoteFile, ...] = ()
    """Of that commit, or of the one that a new branch would begin with."""


class Publisher(Protocol):
    """One hub, as models are brought to it. `target` is a repository, its revision a branch.

    Every method raises HubError for what another try would not mend.
    """

    def working(self) -> AbstractContextManager[None]:
        """Everything below happens in it."""
        ...

    def check(self, target: Source) -> None:
        """Raises HubError if there is no token, or none that the hub may get. No request is made."""
        ...

    def look(self, target: Source) -> Remote | None:
        """The repository; None if there is none, or none that this user may see."""
        ...

    def create(self, target: Source, *, private: bool, license: str | None) -> None:
        """Makes the repository."""
        ...

    def make_branch(self, target: Source) -> None:
        """Makes the branch, from the default one."""
        ...

    def upload(self, target: Source, file: LocalFile, tell: Callable[[int], None]) -> None:
        """Brings the bytes of a large file to where they stay, also if no commit follows; of a small one nothing. `tell` is
        called with how many have been sent."""
        ...

    def commit(
        self, target: Source, files: Sequence[LocalFile], removed: Sequence[str], message: str
    ) -> None:
        """Makes one commit of files that were uploaded."""
        ...

    def url(self, target: Source) -> str:
        """Where people see the repository."""
        ...
