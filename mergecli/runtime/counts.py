"""Whole numbers that are given in Python, where nothing has read them yet."""

from __future__ import annotations

from mergecli.runtime.errors import UsageError


def is_count(value: object, least: int = 1) -> bool:
    """Whether it is a whole number of at least `least`, and neither a truth value nor a number such as 2.0."""
    from numbers import Integral  # NumPy's whole numbers too

    return not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= least


def expect_count(name: str, value: object, least: int = 1) -> None:
    """Raises UsageError unless `value` is None, or a whole number of at least `least`."""
    if value is not None and not is_count(value, least):
        raise UsageError(f"{name}: expected a whole number, at least {least}, got {value!r}")
