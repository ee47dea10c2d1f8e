"""Progress: bars on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

import threading

import pytest

from mergecli.cli import console, progress
from mergecli.cli.progress import Bars, Lines
from mergecli.runtime import verbosity


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_has_the_amount_the_rate_and_the_time_that_is_left() -> None:
    clock = Clock()
    lines = Lines(print, "mergecli finetune", clock)
    clock.now = 130
    assert lines.line() == "mergecli finetune: running for 30.0 s"
    lines("digits: loss 2.100, 400 images/s", 500, 4000)
    assert lines.line() == "digits: loss 2.100, 400 images/s, 500 of 4,000 (12%)"
    clock.now = 190
    lines("digits: loss 0.532, 480 images/s", 680, 4000)
    assert lines.line() == "digits: loss 0.532, 480 images/s, 680 of 4,000 (17%), 3.0/s, 18 min 27 s left"


def test_another_kind_of_work_has_a_rate_of_its_own() -> None:
    clock = Clock()
    lines = Lines(print, "mergecli eval", clock)
    lines("digits", 0, 10)
    clock.now += 1
    lines("digits", 10, 10)
    lines("letters", 0, 2000)
    clock.now += 2
    lines("letters", 1000, 2000)
    assert lines.line() == "letters, 1,000 of 2,000 (50%), 500/s, 2.0 s left"


def test_lines_are_said_again_and_again_until_the_work_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.001)
    said: list[str] = []
    enough = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if sum(each.startswith("digits, 1 of 2 (50%)") for each in said) == 3:
            enough.set()

    with Lines(say, "mergecli eval") as lines:
        lines("digits", 1, 2)  # before it, lines say for how long the command has been running
        assert enough.wait(60)
    assert said[-1].startswith("digits, 1 of 2 (50%)")


def test_bars_cost_nothing_before_the_first_report(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars():
        pass
    assert capsys.readouterr().err == ""


def test_who_is_to_be_quiet_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with console.progress() as shown:
        assert isinstance(shown, Lines)
    monkeypatch.setattr(verbosity, "quiet", True)
    with console.progress() as shown:
        assert shown is None
