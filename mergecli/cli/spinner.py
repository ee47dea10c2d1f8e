"""What is seen on a terminal before there is anything to show: `mergecli merge: loading torch ...`.

It appears before the parser is imported, so this file imports next to nothing. It uses no escape codes, and is gone
before anything else is printed.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress

from mergecli.cli.commands import COMMANDS

_LIBRARIES = {
    "datasets", "huggingface_hub", "matplotlib", "modelscope_hub", "pandas", "peft", "pyarrow", "scipy", "torch",
    "transformers",
}  # fmt: skip
"""Those whose import takes long enough to be named."""
_SILENT = {"-q", "--quiet", "-h", "--help", "--version", "--install-completion", "--show-completion"}
_SECONDS = 0.1


class _Spinner:
    """Draws a line again and again, until it is stopped."""

    def __init__(self, title: str) -> None:
        self._title, self._library, self._drawn, self._turn = title, "", 0, 0
        self._lock, self._stopped = threading.RLock(), threading.Event()
        encoding = (sys.stderr.encoding or "").lower()
        self._frames = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏" if encoding.startswith("utf") else "-\\|/"
        sys.meta_path.insert(0, self)  # pyright: ignore[reportArgumentType]
        self._draw()
        threading.Thread(target=self._run, name="spinner", daemon=True).start()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Asked by every import, which this finds nothing for: it only sees which library is loaded now."""
        del path, target
        if name in _LIBRARIES:
            self._library = name
            self._draw()

    def _run(self) -> None:
        while not self._stopped.wait(_SECONDS):
            self._draw()

    def _draw(self) -> None:
        with self._lock:
            if self._stopped.is_set():
                return
            text = f"{self._frames[self._turn % len(self._frames)]} {self._title}"
            text += f": loading {self._library} ..." if _is_loading(self._library) else " ..."
            self._turn += 1
            self._write(text[: _columns() - 1])

    def _write(self, text: str) -> None:
        blank = " " * max(0, self._drawn - len(text))
        with suppress(OSError, ValueError):  # nobody reads stderr any more
            sys.stderr.write(f"\r{text}{blank}" if text else f"\r{blank}\r" if blank else "")
            sys.stderr.flush()
        self._drawn = len(text)

    @contextmanager
    def cleared(self) -> Generator[None]:
        """The line is gone for the time of the block."""
        with self._lock:
            self._write("")
            yield

    def stop(self) -> None:
        """The line is gone for good."""
        with self._lock:
            self._stopped.set()
            self._write("")
        if self in sys.meta_path:
            sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]


_spinner: _Spinner | None = None


def start(arguments: Sequence[str]) -> None:
    """Draws the line where a command is run on a terminal, and not only asked for its help."""
    global _spinner
    command = next((each for each in arguments if not each.startswith("-")), "")
    if command in COMMANDS and _SILENT.isdisjoint(arguments) and is_terminal() and _is_alone():
        _spinner = _Spinner(f"mergecli {command}")


def stop() -> None:
    """Something else is to be seen from now on."""
    global _spinner
    if _spinner is not None:
        _spinner.stop()
        _spinner = None


@contextmanager
def cleared() -> Generator[None]:
    """The line is gone for the time of the block, in which something is printed."""
    if _spinner is None:
        yield
        return
    with _spinner.cleared():
        yield


def is_terminal() -> bool:
    """Whether stderr is a terminal that can draw over a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _is_alone() -> bool:
    """Whether no other process draws on this terminal; `runtime.distributed` would cost milliseconds here."""
    return os.environ.get("WORLD_SIZE", "1") == "1" and "_MERGECLI_COMPLETE" not in os.environ


def _is_loading(library: str) -> bool:
    """Whether its import, which has begun, has not ended."""
    if not library:
        return False
    spec = getattr(sys.modules.get(library), "__spec__", None)
    return spec is None or getattr(spec, "_initializing", False)


def _columns() -> int:
    with suppress(OSError, ValueError):
        return int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(sys.stderr.fileno()).columns or 80
    return 80
