"""Whether Ctrl-C was pressed: libraries that are being imported may turn it into another error."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

pressed = False


def watch() -> None:
    """Remembers Ctrl-C from now on, and raises KeyboardInterrupt as always."""
    signal.signal(signal.SIGINT, _press)


def _press(number: int, frame: FrameType | None) -> NoReturn:
    global pressed
    del number, frame
    pressed = True
    raise KeyboardInterrupt


def ignore() -> None:
    """Lets Ctrl-C do nothing from now on: the work is done, and Python is taking itself down."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed and some library swallowed it; for loops of long work."""
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def undisturbed() -> Generator[None]:
    """Lets Ctrl-C, and termination, wait until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for number in came:
            signal.raise_signal(number)
