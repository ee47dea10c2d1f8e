"""Remarks on what a command found: the program prints them, Python callers do not hear them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

_hearers: list[Callable[[str], None]] = []


def note(text: str) -> None:
    """Says something that a user may want to know; unlike a warning, it asks for nothing."""
    for hear in _hearers:
        hear(text)


@contextmanager
def heard_by(hear: Callable[[str], None]) -> Generator[None]:
    """Gives `hear` every note of the block, each text once."""
    known: set[str] = set()

    def once(text: str) -> None:
        if text not in known:
            known.add(text)
            hear(text)

    _hearers.append(once)
    try:
        yield
    finally:
        _hearers.remove(once)
