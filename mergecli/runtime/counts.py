"""Whole numbers that are given in Python, where nothing has read them yet."""

from __future__ import annotations

from mergecli.runtime.errors import UsageError


def is_count(value: object, least: int = 1) -> bool:
    """Whether it is an `int` of at least `least`, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def count(name: str, value: object, least: int = 1) -> int:
    """The whole number as an `int`, which files and messages take: NumPy has others.

    Raises:
        UsageError: it is below `least`, or no whole number, as 2.0 and True are none.
    """
    from numbers import Integral

    whole = int(value) if not isinstance(value, bool) and isinstance(value, Integral) else value
    if not is_count(whole, least):
        raise UsageError(f"{name}: expected a whole number, at least {least}, got {value!r}")
    assert isinstance(whole, int)
    return whole
