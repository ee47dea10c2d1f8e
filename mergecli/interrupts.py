"""Whether Ctrl-C was pressed: libraries that are being imported may turn it into another error."""

from __future__ import annotations

import signal
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
