"""Dry runs: a verb is called as for the work, makes its own checks, and ends where the work would begin; nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar

_dry: ContextVar[bool] = ContextVar("dry", default=False)
_measures: ContextVar[bool] = ContextVar("measures", default=True)


class Planned(BaseException):  # no error, which something could handle on the way
    """Ends a dry run, with its plan."""

    def __init__(self, plan: object) -> None:
        super().__init__()
        self.plan = plan


def is_dry() -> bool:
    """Whether nothing may be written: no output, nothing in the store, and nothing is removed."""
    return _dry.get()


@contextmanager
def dry(*, measures: bool = True) -> Generator[None]:
    """Makes what the block calls a dry run; without `measures` it ends without a plan."""
    tokens = _dry.set(True), _measures.set(measures)
    try:
        yield
    finally:
        _dry.reset(tokens[0])
        _measures.reset(tokens[1])


def work_begins(plan: Callable[[], object]) -> None:
    """Where a verb has made all its checks: a dry run ends here, with what `plan` returns."""
    if is_dry():
        raise Planned(plan() if _measures.get() else None)
