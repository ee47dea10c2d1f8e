"""How far work is: the callback that is told, and bars for callers who have none of their own."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any, Literal

from mergecli.runtime.errors import UsageError, did_you_mean, quoted

Progress = Callable[[str, int, int], None]
"""Called with a description, the amount done, and the total."""
AnyProgress = Progress | Literal["rich", "tqdm"]
"""A callback, or the library that draws a bar for each kind of work; one kind is what has the same description up to a colon."""


@contextmanager
def shown(progress: AnyProgress | None) -> Generator[Progress | None]:
    """The callback; of a library's name one that draws bars, which end with the block.

    Raises:
        UsageError: there is no such bar, or the library is not installed.
    """
    if not isinstance(progress, str):
        yield progress
        return
    bars = {"rich": _rich, "tqdm": _tqdm}
    if progress not in bars:
        near = did_you_mean(progress, bars)
        raise UsageError(f"progress: expected a function or one of {quoted(bars)}, got `{progress}`{near}")
    with ExitStack() as stack:
        try:
            draw = bars[progress](stack)
        except ImportError as error:
            raise UsageError(
                f"progress: {progress} is not installed", f"install it: `pip install {progress}`"
            ) from error
        lock = Lock()  # downloads tell from several threads

        def locked(description: str, done: int, total: int) -> None:
            with lock:
                draw(description, done, total)

        yield locked


def _rich(stack: ExitStack) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    drawn = stack.enter_context(
        Progress(TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    )  # fmt: skip
    bars: dict[str, Any] = {}

    def draw(description: str, done: int, total: int) -> None:
        word = description.partition(":")[0]
        if word not in bars:
            bars[word] = drawn.add_task(description, total=total)
        drawn.update(bars[word], completed=done, total=total, description=description)

    return draw


def _tqdm(stack: ExitStack) -> Progress:
    from tqdm.auto import tqdm

    bars: dict[str, Any] = {}

    def draw(description: str, done: int, total: int) -> None:
        word = description.partition(":")[0]
        if word not in bars:
            bars[word] = stack.enter_context(tqdm(total=total, desc=description))
        bar = bars[word]
        bar.total, bar.n = total, done
        bar.set_description(description, refresh=False)
        bar.refresh()

    return draw
