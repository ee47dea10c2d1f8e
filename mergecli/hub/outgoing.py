"""A file on its way to a hub: it tells how far it is, and stops when the work is given up."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.hub.retry import StoppedError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BLOCK = 1 << 20


class Outgoing(io.BufferedReader):
    """The bytes of a file, for a client that reads and seeks."""

    def __init__(self, path: Path, stop: threading.Event, tell: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path), _BLOCK)
        self._stop, self._tell = stop, tell

    def _moved(self) -> None:
        if self._stop.is_set():
            raise StoppedError
        self._tell(self.tell())

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._moved()
        return data

    def readinto(self, buffer: Buffer, /) -> int:
        count = super().readinto(buffer)
        self._moved()
        return count
