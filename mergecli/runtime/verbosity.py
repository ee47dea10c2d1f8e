"""How much is said. The program sets it from its global options; Python callers may, too."""

from __future__ import annotations

quiet = False
"""Only warnings and errors: no notes, no progress, no line at the end."""
verbose = False
"""Lists are shown whole, and messages with their details."""
debug = False
"""The traceback of every error, also of those that the user can mend."""


def reset() -> None:
    """As at the start of a program without options."""
    global quiet, verbose, debug
    quiet = verbose = debug = False
