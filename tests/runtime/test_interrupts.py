"""Ctrl-C: remembered, raised again, and delayed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mergecli.runtime import interrupts
from tests.conftest import Ended, Run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(interrupts, "received", 0)
    interrupts.watch()
    yield
    signal.signal(signal.SIGINT, handler)


def test_an_interrupt_that_a_library_swallowed_is_raised_again() -> None:
    interrupts.check()
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert interrupts.received
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_torch_is_imported(number: signal.Signals, tmp_path: Path) -> None:
    lines = ["import os, time", f"os.kill(os.getpid(), {number})", "time.sleep(0.2)", "is_whole = True"]
    (tmp_path / "torch.py").write_text("\n".join(lines))
    code = (
        "import sys, time; from mergecli.runtime import interrupts; interrupts.watch(); interrupts.watch_endings()\n"
        "try:\n  import torch; time.sleep(20)\n"
        "except BaseException as error: print(type(error).__name__, sys.modules['torch'].is_whole)"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    out = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ).stdout
    assert out == {signal.SIGINT: "KeyboardInterrupt True\n", signal.SIGTERM: "SystemExit True\n"}[number]


def test_an_interrupt_waits_until_the_block_has_ended() -> None:
    ended = False
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        ended = True
    assert ended


def test_an_interrupt_after_the_work_does_nothing() -> None:
    interrupts.ignore()
    signal.raise_signal(signal.SIGINT)
    assert not interrupts.received


@pytest.mark.parametrize("number", interrupts.ENDING)
def test_signals_that_end_a_program_wait_too(number: signal.Signals) -> None:
    received: list[int] = []
    before = signal.signal(number, lambda number, _: received.append(number))
    try:
        with interrupts.deferred():
            signal.raise_signal(number)
            assert received == []
        assert received == [number]
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.deferred():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", interrupts.ENDING)
def test_an_ending_that_a_library_turned_into_another_error_is_still_that_ending(
    number: signal.Signals, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallow(*given: object, **more: object) -> None:
        try:
            signal.raise_signal(number)
        except SystemExit:
            raise RuntimeError("something in a library") from None

    monkeypatch.setattr("mergecli.cli.methods._of_each_kind", swallow)
    kept = "interrupted: nothing new is kept; the same command starts again\n"
    assert run("methods") == Ended(128 + number, "", kept)
