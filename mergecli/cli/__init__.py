"""The command line. The parser and all it needs are imported when a command is run."""

from __future__ import annotations

from collections.abc import Sequence

from mergecli.cli.commands import COMMANDS as COMMANDS


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    from mergecli.cli.app import run

    return run(arguments)
