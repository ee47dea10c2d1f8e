"""Files and folders that are not whole yet: their names, the locks that say that somebody still writes them, and the removal
of those that programs left behind when they were killed."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Generator
from pathlib import Path

_NAME = re.compile(r"\..*\.(?P<process>\d+)-[0-9a-f]{8}\.part", re.DOTALL)
_LONGEST = 220
"""Bytes of the target's own name in that of what is not whole: file systems allow 255 in all."""
_MOMENT = 60
"""Seconds in which a program that has made a file surely locks it."""
_LONG = 24 * 3600
"""Seconds after which a file that cannot be locked was left behind, if its program has ended."""


def new_name(path: Path) -> Path:
    """A hidden name beside `path`, for what is not whole yet; it says which process writes it."""
    own = os.fsencode(path.name)[:_LONGEST].decode(errors="ignore")
    return path.with_name(f".{own}.{os.getpid()}-{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def locked(path: Path) -> Generator[None]:
    """Says for the duration of the block that this process writes the file or folder; the system takes the lock back
    however the process ends."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        with contextlib.suppress(OSError, ImportError):  # not every file system has locks
            _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Removes what programs that were killed have left in the folder."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.name.endswith(".part") and is_leftover(path := folder / entry.name):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        path.unlink()


def is_leftover(path: Path) -> bool:
    """Whether the path has a name as of `new_name`, and nobody writes it any more."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return False
    try:
        age = time.time() - path.lstat().st_mtime
        kind = os.O_RDONLY if path.is_dir() else os.O_RDWR
        descriptor = os.open(path, kind | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    ended = not _runs(int(match["process"]))
    try:
        _lock(descriptor)
    except BlockingIOError:
        return False
    except (OSError, ImportError):
        return ended and age > _LONG  # of a process on another machine nothing is known
    finally:
        os.close(descriptor)
    # another process may have the number by now, or be of another container
    return ended or age > _MOMENT


def _lock(descriptor: int) -> None:
    """Takes the lock; raises BlockingIOError if another has it, and another OSError where there are no locks."""
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _runs(process: int) -> bool:
    """Whether this machine has a process of that number, other than this one."""
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
