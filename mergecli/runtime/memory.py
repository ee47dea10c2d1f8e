"""The memory of this process."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from pathlib import Path

_starting = False


def start() -> None:
    """From now on no garbage is looked for, until `started`.

    To import torch and ourselves makes a quarter of a million objects that stay. To look through them again and again while
    they are made takes a fifth of a second.
    """
    global _starting
    _starting = True
    gc.disable()


def started() -> None:
    """Garbage is looked for again, though not among what the start has made; does nothing without `start`."""
    global _starting
    if _starting:
        _starting = False
        gc.freeze()
        gc.enable()


def peak_memory() -> int:
    """The most bytes of memory that this process has held; 0 where the system does not say."""
    # ru_maxrss is that of the parent where it was larger when it started us, so it is asked last
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
