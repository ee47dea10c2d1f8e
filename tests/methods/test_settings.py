"""The types and ranges of settings."""

from __future__ import annotations

import pytest

from mergecli.methods._settings import Range, setting_problems
from mergecli.methods.ties import Ties


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "text"),
    [
        (Range(), [-1e9, 1e9], [], ""),
        (Range(1), [1, 9], [0.9], "at least 1"),
        (Range(0, open_low=True), [0.1], [0, -1], "above 0"),
        (Range(0, 1), [0, 1], [-0.1, 1.1], "in [0, 1]"),
        (Range(0, 1, open_low=True), [1], [0], "in (0, 1]"),
        (Range(0, 1, open_high=True), [0], [1], "in [0, 1)"),
    ],
)
def test_a_range_holds_its_ends_unless_they_are_open(
    limits: Range, inside: list[float], outside: list[float], text: str
) -> None:
    assert all(number in limits for number in inside)
    assert not any(number in limits for number in outside)
    assert str(limits) == text


def test_every_problem_of_a_methods_settings_is_told_at_once() -> None:
    given = {"densty": 0.1, "density": 2, "aggregate": "median", "scaling_factor": True}
    problems = dict(setting_problems(Ties, given))
    assert problems["densty"].startswith("unknown setting (did you mean `density`?)")
    assert problems["density"] == "expected a number in (0, 1], got 2"
    assert problems["aggregate"] == 'expected one of "sum", "mean", "max", got "median"'
    assert problems["scaling_factor"] == "expected a number, got true"
