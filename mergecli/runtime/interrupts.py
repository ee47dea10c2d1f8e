"""Remembers Ctrl-C and its like, since a library may turn them into another error, delays them, and says what is kept."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from mergecli.runtime import memory

received = 0
"""The number of the signal that asked the program to end: Ctrl-C, or one of `ENDING`; 0 as long as there is none."""
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a program to end: by `kill` or a batch system, and by a terminal that has gone."""


def watch() -> None:
    """From now on Ctrl-C is remembered in `received`; it raises KeyboardInterrupt as usual."""
    signal.signal(signal.SIGINT, _press)


def _press(number: int, frame: FrameType | None) -> None:
    global received
    del frame
    received = number
    if not _comes_again(number):
        raise KeyboardInterrupt


def watch_endings() -> None:
    """From now on the first of `ENDING` is remembered in `received` and raises SystemExit; the next ones do nothing."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    global received
    del frame
    received = number
    if _comes_again(number):
        return
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _comes_again(number: int) -> bool:
    """Whether the signal has come while torch was imported. It is sent again then, until that is over: torch's C++ passes on
    no error of Python, and would abort the program with a dump."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if not getattr(spec, "_initializing", False):
        return False
    # to the main thread, so that what waits there ends
    again = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, number])
    again.daemon = True
    again.start()
    return True


def ignore() -> None:
    """From now on Ctrl-C does nothing: the work is done, and Python is shutting down."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check() -> None:
    """Raises again what a signal has raised, if a library swallowed it; for long loops. With the first one the start is over."""
    memory.started()
    if received == signal.SIGINT:
        raise KeyboardInterrupt
    if received:
        raise SystemExit(128 + received)


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
    if (received or isinstance(error, KeyboardInterrupt | SystemExit)) and (text := kept()):
        error.add_note(text)


def kept_by(error: BaseException) -> str:
    """What is kept after an interruption; empty if nothing is."""
    return "; ".join(dict.fromkeys(getattr(error, "__notes__", ())))
