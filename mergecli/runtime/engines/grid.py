"""The loop above the engines: units are submitted, a lost worker's unit again, a failed one once; the caller gets each result."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from mergecli.runtime import interrupts
from mergecli.runtime.engines.contract import Engine, Executor, LostWorkerError, Report, Unit, Work
from mergecli.runtime.errors import InputError, MergecliError, MergecliWarning, UsageError, listed
from mergecli.runtime.progress import Progress


class Failure(NamedTuple):
    """A unit that failed for its input."""

    unit: Unit
    error: MergecliError


class FailedUnitsError(MergecliError):
    """Units have failed, and the others are done; its status is that of the first failure by itself."""

    def __init__(self, failures: Sequence[Failure], total: int, results: Any = ()) -> None:
        first = failures[0].error
        same: dict[str, list[str]] = {}
        for each in failures:
            same.setdefault(each.error.message, []).append(each.unit.name)
        lines = [
            f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''}: {message}"
            for message, names in same.items()
        ]
        super().__init__(f"{len(failures)} of {total} units failed:\n{listed(lines, 20)}", first.hint)
        self.status = first.status
        self.failures = tuple(failures)
        self.results = results
        """What could be put together all the same."""


class Failures:
    """What failed for its input: what units are about, by kind and name, and units. Without `keep_going` the first failure ends all."""

    def __init__(self, keep_going: bool) -> None:
        self._keep_going = keep_going
        self.found: dict[tuple[str, str], MergecliError] = {}
        self.units: list[Failure] = []

    @contextmanager
    def of(self, kind: str, name: str) -> Generator[None]:
        """A block that only concerns what is called so, such as a `tower` or a `task`."""
        try:
            yield
        except MergecliError as error:
            if not self._keep_going:
                raise
            self.found[kind, name] = error

    def check(self, total: int, results: Any = ()) -> None:
        """Raises FailedUnitsError if units have failed."""
        if self.units:
            raise FailedUnitsError(self.units, total, results)


def run_grid(
    work: Work,
    units: Sequence[Unit],
    engine: Engine,
    write: Callable[[Unit, Report], None],
    is_done: Callable[[Unit], bool],
    progress: Progress | None = None,
) -> list[Failure]:
    """Runs the units and gives each result to `write`; the failures, with `keep_going`.

    Args:
        is_done: asked just before a unit is submitted, since another program may have done it meanwhile.

    Raises:
        MergecliError: the first failure, without `keep_going`; or a worker was lost too often.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "the processes of `torchrun` share the work already", "leave out the options of engines"
        )
    if not units:
        return []
    with _workers_of(engine, work.device) as executor, executor.serving(work):
        return _run(executor, work, units, engine, write, is_done, progress)


def _run(
    executor: Executor[Any],
    work: Work,
    units: Sequence[Unit],
    engine: Engine,
    write: Callable[[Unit, Report], None],
    is_done: Callable[[Unit], bool],
    progress: Progress | None,
) -> list[Failure]:
    waiting = deque((unit, 0) for unit in units)
    running: dict[Any, tuple[Unit, int]] = {}
    failures: list[Failure] = []
    done = 0

    def tell(more: int = 1) -> None:
        nonlocal done
        done += more
        if progress:
            progress("units", done, len(units))

    tell(0)
    while waiting or running:
        interrupts.check()
        while waiting and len(running) < executor.slots:
            unit, tries = waiting.popleft()
            if is_done(unit):
                tell()
                continue
            running[executor.submit(work, unit)] = unit, tries
        for each in executor.wait(list(running)) if running else ():
            unit, tries = running.pop(each)
            try:
                report = each.result()
            except LostWorkerError as error:
                if tries >= executor.retries:
                    raise InputError(
                        f"{unit.name}: its worker was lost {engine.retries + 1} times: {error}",
                        "it may take more memory than there is: run fewer units at a time",
                    ) from error
                waiting.appendleft((unit, tries + 1))
            except MergecliError as error:
                if not engine.keep_going:
                    raise
                failures.append(Failure(unit, error))
                tell()
            else:
                for text in report.warnings:
                    warnings.warn(text, MergecliWarning, stacklevel=2)
                with interrupts.deferred():
                    write(unit, report)
                tell()
    return failures


_staying: list[dict[tuple[Engine, str], Executor[Any]]] = []
"""The workers that stay, of the block that we are in, if there is one."""


@contextmanager
def workers_stay() -> Generator[None]:
    """A block in which the workers that one call of `run_grid` has started serve the next ones: each start takes seconds."""
    if _staying:
        yield
        return
    _staying.append({})
    try:
        yield
    finally:
        for executor in _staying.pop().values():
            executor.shutdown()


@contextmanager
def _workers_of(engine: Engine, device: str) -> Generator[Executor[Any]]:
    """The workers that the settings mean; they end with the block unless they stay, or it fails."""
    key = replace(engine, part=None, collect=False, keep_going=False), device
    known = _staying[0] if _staying else {}
    executor = known.pop(key, None) or open_executor(engine, device)
    try:
        yield executor
    except BaseException:
        executor.shutdown()
        raise
    if _staying:
        known[key] = executor
    else:
        executor.shutdown()


def open_executor(engine: Engine, device: str) -> Executor[Any]:
    """The engine that the settings mean, ready for work on that device."""
    if engine.name == "ray":
        from mergecli.runtime.engines.ray import open_ray

        return open_ray(engine, device)
    from mergecli.runtime.engines.local import open_local

    return open_local(engine)
