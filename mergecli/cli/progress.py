"""How far a command is: bars on a terminal, and elsewhere a line every half a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

from mergecli.cli import spinner
from mergecli.cli.amounts import duration
from mergecli.runtime.visible import visible

EVERY = 30.0
"""Seconds between two lines."""


class Bars:
    """Draws a bar for each kind of work, in which descriptions with the same beginning (up to a colon) are one kind."""

    def __init__(self) -> None:
        self._drawn: Any = None
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        return self

    def __call__(self, description: str, done: int, total: int) -> None:
        """`done` of `total` are done."""
        if self._drawn is None:
            spinner.stop()
            self._drawn = _rich_bars()
            self._drawn.start()
        description = visible(description)
        word = description.split(":")[0]
        if word not in self._bars:
            self._bars[word] = self._drawn.add_task(description, total=total)
        self._drawn.update(self._bars[word], completed=done, total=total, description=description)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn is not None:
            self._drawn.stop()


def _rich_bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip


class _State(NamedTuple):
    """What was reported last, and where and when this kind of work began."""

    description: str
    done: int
    total: int
    first: int
    began: float


class Lines:
    """Says every `EVERY` seconds what was reported last, with its rate and the time that is left."""

    def __init__(
        self, say: Callable[[str], None], title: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._title, self._clock = say, title, clock
        self._state: _State | None = None
        self._began = clock()
        self._ended = threading.Event()

    def __enter__(self) -> Lines:
        threading.Thread(target=self._run, name="progress", daemon=True).start()
        return self

    def __call__(self, description: str, done: int, total: int) -> None:
        """`done` of `total` are done."""
        state = self._state
        word = description.partition(":")[0]
        if state is None or state.description.partition(":")[0] != word:
            self._state = _State(description, done, total, done, self._clock())
        else:
            self._state = state._replace(description=description, done=done, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            self._say(self.line())

    def line(self) -> str:
        """How far the work is now."""
        state, now = self._state, self._clock()
        if state is None:
            return f"{self._title}: running for {duration(now - self._began)}"
        parts = [
            state.description,
            f"{state.done:,} of {state.total:,} ({state.done / max(state.total, 1):.0%})",
        ]
        rate = (state.done - state.first) / max(now - state.began, 1e-9)
        if rate:
            parts += [f"{rate:,.{0 if rate >= 100 else 1 if rate >= 1 else 3}f}/s"]
            parts += [f"{duration((state.total - state.done) / rate)} left"]
        return ", ".join(parts)
