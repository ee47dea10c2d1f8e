"""How long an answer of a hub may take, how large it may be, and whom a token may reach.

A hub answers a question in a second and a few kilobytes. What takes much longer or is much larger is a hub, or something
on the way to it, that would keep a program waiting for ever or fill its memory.
"""

from __future__ import annotations

import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar
from urllib.parse import urlsplit

from mergecli.hub.retry import StoppedError

T = TypeVar("T")

ANSWER_SECONDS = 60.0
"""For one question, and for the beginning of a file: until the last byte of the answer, or the first of the file."""
ANSWER_BYTES = 32 << 20
"""Of one answer, as it is once it is decompressed."""
LIST_SECONDS = 600.0
"""For all pages of one list."""
LIST_BYTES = 256 << 20
"""Of all pages of one list."""
LIST_PAGES = 10_000
_BLOCK = 1 << 16


class LimitError(Exception):
    """An answer that is too slow, too large, or packed in a way that nobody asked for; what the hub did, in words."""


def same_origin(url: str, endpoint: str) -> bool:
    """Whether the URL is at the endpoint: its scheme, host and port, which are what a token is for."""
    try:
        return _origin(url) == _origin(endpoint)
    except ValueError:
        return False


def _origin(url: str) -> tuple[str, str | None, int | None]:
    split = urlsplit(url)
    return split.scheme, split.hostname, split.port or {"http": 80, "https": 443}.get(split.scheme)


def within(seconds: float, action: Callable[[], T], stop: threading.Event) -> T:
    """The result of an action. When it takes too long it goes on in a thread of its own, which keeps no program alive.

    Timeouts of sockets do not suffice: a server that sends a byte now and then, of a header too, meets them for ever.

    Raises:
        LimitError: it takes longer than that. StoppedError: the work was given up meanwhile.
    """
    ended: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            ended.put((action(), None))
        except BaseException as error:  # noqa: BLE001  handed over to the caller
            ended.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    end = time.monotonic() + seconds
    while True:
        try:
            result, error = ended.get(timeout=max(0.0, min(0.5, end - time.monotonic())))
        except queue.Empty:
            if stop.is_set():
                raise StoppedError from None
            if time.monotonic() >= end:
                raise LimitError(f"takes longer than {seconds:.0f} s to answer") from None
            continue
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]  None only where the action returns it


def unpacked(blocks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """The bytes of a body in blocks of bounded size, though the server has compressed them unasked.

    The hubs' libraries decompress a block as a whole, and again for each encoding that is named: a few bytes can become
    more than any memory holds.

    Raises:
        LimitError: they are compressed otherwise than once by gzip.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        yield from blocks
        return
    if name not in ("gzip", "x-gzip", "deflate"):
        raise LimitError(f"compresses its answer as `{name[:40]}`, which was not asked for")
    state = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, whichever its first bytes show
    try:
        for block in blocks:
            rest, found = block, b""
            while rest or len(found) == _BLOCK:
                found = state.decompress(rest, _BLOCK)
                rest = state.unconsumed_tail
                yield found
    except zlib.error as error:
        raise LimitError("says that its answer is compressed, and it is not") from error


def whole(blocks: Iterable[bytes], encoding: str) -> bytes:
    """A whole answer.

    Raises:
        LimitError: it is too large, or arrives too slowly.
    """
    end, found = time.monotonic() + ANSWER_SECONDS, bytearray()
    for block in unpacked(blocks, encoding):
        found += block
        if len(found) > ANSWER_BYTES:
            raise LimitError(f"answers with more than {ANSWER_BYTES:,} bytes")
        if time.monotonic() > end:
            raise LimitError(f"takes longer than {ANSWER_SECONDS:.0f} s to answer")
    return bytes(found)


class ListBudget:
    """What the pages of one list may take together."""

    def __init__(self) -> None:
        self._pages = self._bytes = 0
        self._end = time.monotonic() + LIST_SECONDS

    def add(self, size: int) -> None:
        """Counts a page of so many bytes.

        Raises:
            LimitError: the list is longer, or slower, than any that is of use.
        """
        self._pages += 1
        self._bytes += size
        if self._pages > LIST_PAGES:
            raise LimitError(f"lists its files on more than {LIST_PAGES:,} pages")
        if self._bytes > LIST_BYTES:
            raise LimitError(f"lists its files in more than {LIST_BYTES:,} bytes")
        if time.monotonic() > self._end:
            raise LimitError(f"takes longer than {LIST_SECONDS:.0f} s to list its files")
