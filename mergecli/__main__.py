"""The program: `python -m mergecli`."""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import suppress

try:
    from mergecli.runtime import interrupts, memory
except KeyboardInterrupt:
    sys.exit(130)


def main() -> None:
    """Runs the command line and ends the process with its exit status."""
    _open_closed_streams()
    interrupts.watch()
    memory.start()
    from mergecli.cli import run, spinner

    spinner.start(sys.argv[1:])
    try:
        status = run()
    except KeyboardInterrupt:
        status = 130
    except Exception:
        if not interrupts.received:
            raise
        status = 128 + interrupts.received
    finally:
        spinner.stop()
    if interrupts.received == signal.SIGINT:
        # `python -m` ends by the signal, whatever status we ask for, if Ctrl-C came while a library executed a string
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        gc.collect()  # a file that was not whole goes with the block that Ctrl-C has cut off as it began
        os._exit(status)
    interrupts.ignore()
    sys.exit(status)


def _open_closed_streams() -> None:
    """Puts the null device where stdin, stdout or stderr is closed, so that no file of ours takes its number."""
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


if __name__ == "__main__":
    main()
