"""The program: `python -m mergecli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and ends the process with its exit status."""
    from mergecli.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
