"""What a hub offers, and the error for what may work another time."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
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

    def files(self, source: Source, commit: str) -> tuple[RemoteFile, ...]:
        """All files of the repository at the commit."""
        ...

    def open(self, source: Source, commit: str, path: str, start: int) -> AbstractContextManager[Body]:
        """The bytes of a file from `start` on."""
        ...
