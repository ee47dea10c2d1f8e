"""Remembers Ctrl-C, since a library that is being imported may turn it into another error, delays it, and says what is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

pressed = False
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a program to end: by `kill` or a batch system, and by a terminal that has gone."""


def watch() -> None:
    """From now on Ctrl-C is remembered in `pressed`; it raises KeyboardInterrupt as usual."""
    signal.signal(signal.SIGINT, _press)


def _press(number: int, frame: FrameType | None) -> NoReturn:
    global pressed
    del number, frame
    pressed = True
    raise KeyboardInterrupt


def ignore() -> None:
    """From now on Ctrl-C does nothing: the work is done, and Python is shutting down."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed and a library swallowed it; for long loops."""
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def deferred() -> Generator[None]:
    """Delays Ctrl-C, SIGTERM and SIGHUP until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    numbers = [
        each for each in (signal.SIGINT, *ENDING) if signal.getsignal(each) != signal.SIG_IGN
    ]  # as `nohup` has it
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for number in received:
            signal.raise_signal(number)


@contextmanager
def telling(kept: Callable[[], str]) -> Generator[None]:
    """Where Ctrl-C ends the block, or a signal that ends the program, its exception is told what is kept.

    `kept` gives it, such as `3 of 8 tasks are kept`; nothing where nothing is. The program says it, and how to go on.
    """
    try:
        yield
    except BaseException as error:
        tell(error, kept)
        raise


def tell(error: BaseException, kept: Callable[[], str]) -> None:
    """Notes on an exception what is kept, if it is an interruption."""
    if (pressed or isinstance(error, KeyboardInterrupt | SystemExit)) and (text := kept()):
        error.add_note(text)


def kept_by(error: BaseException) -> str:
    """What is kept after an interruption; empty if nothing is."""
    return "; ".join(dict.fromkeys(getattr(error, "__notes__", ())))
