"""Whether an input is still what it was: a file that is written to, or replaced, while it is in use is refused.

Its digest is taken at one moment and its content is read at others. One call of the system a file, before and after, tells
whether they belong together.
"""

from __future__ import annotations

import os
from pathlib import Path

from mergecli.runtime.errors import InputError

CHANGED_HINT = "wait until whatever writes it has finished, then start again"


def state_of(file: str | Path | int) -> int:
    """A number that is another one when the file, or an open descriptor's, has been written to or replaced.

    It is made of inode, size and time of change: not of the time of access, which reading changes, nor of that of the inode,
    which a new link to the file changes.
    """
    return state_in(os.stat(file))  # noqa: PTH116  also of a descriptor


def state_in(status: os.stat_result) -> int:
    """The same of what the system has told already."""
    return hash((status.st_ino, status.st_size, status.st_mtime_ns))


def is_unchanged(file: str | Path, before: int) -> bool:
    """Whether the file is what it was, or was deleted: what was opened before that is whole still."""
    try:
        return state_of(file) == before
    except OSError:
        return True


def expect_unchanged(file: str | Path, before: int, opened: int | None = None) -> None:
    """Raises InputError if the file is not what it was.

    Args:
        opened: its descriptor, which tells of changes even if it was deleted.
    """
    if not is_unchanged(file, before) or (opened is not None and state_of(opened) != before):
        raise InputError(f"{file}: changed while it was being read", CHANGED_HINT)
