"""One process at a time: what is made once and kept as a file is made by the first that needs it, and the others wait."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

from mergecli.runtime.dry_run import is_dry


@contextlib.contextmanager
def alone(path: Path) -> Generator[None]:
    """Other processes that enter such a block for the same path wait until this one has left it. On file systems without
    locks nobody waits, and what is made is made twice.

    The lock is a hidden file beside `path`, which goes again.
    """
    lock = path.with_name(f".{path.name}.lock")
    descriptor = None if is_dry() else _locked(lock)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                lock.unlink()
            os.close(descriptor)


def _locked(lock: Path) -> int | None:
    """The open lock; None where there can be none."""
    while True:
        try:
            import fcntl

            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except (OSError, ImportError):
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):  # noqa: PTH116
                return descriptor
        except FileNotFoundError:
            pass  # who had it has removed it: nobody else would wait for this one
        except OSError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
