"""What a command says after Ctrl-C: what is kept, and how to go on."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from mergecli.evaluation import scoring
from mergecli.merging.learning import probe
from mergecli.runtime import interrupts
from tests.conftest import Run, World

NOTHING = "interrupted: nothing new is kept; the same command starts again\n"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C of one test is not one of the next."""
    monkeypatch.setattr(interrupts, "received", 0)


def press_at_call(patch: pytest.MonkeyPatch, place: Any, name: str, number: int) -> None:
    """Ctrl-C when the function is called the second time, or another."""
    function, calls = getattr(place, name), 0

    def pressed(*given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            signal.raise_signal(signal.SIGINT)
        return function(*given, **more)

    patch.setattr(place, name, pressed)


def test_where_nothing_is_kept_it_says_so(world: World, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergecli.merging import merge

    press_at_call(monkeypatch, merge, "_stream", 1)
    ended = run("merge", "t1.safetensors", "t2.safetensors", "--method", "average", "-o", "m.safetensors")
    assert (ended.status, ended.out, ended.err, ended.end) == (130, "", NOTHING, "")
    assert not (world.folder / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("checkpoints", "what"),
    [(["toy:base"], "1 of 2 tasks"), (["toy:base", "toy:digits"], "2 of 4 tasks of all checkpoints")],
)
@pytest.mark.usefixtures("own_store")
def test_an_evaluation_keeps_the_tasks_that_are_counted(
    run: Run, monkeypatch: pytest.MonkeyPatch, checkpoints: list[str], what: str
) -> None:
    command = ("eval", *checkpoints, "--clip", "toy:base", "--task", "digits,letters", "--limit", 5)
    with monkeypatch.context() as patch:
        press_at_call(patch, scoring.Scoring, "count", 2)
        ended = run(*command, "--quiet")
    assert (ended.status, ended.out) == (130, "")
    assert ended.err == f"interrupted: {what} are kept; the same command goes on\n"
    assert run(*command).status == 0


@pytest.mark.usefixtures("own_store")
def test_a_measurement_keeps_the_files_that_are_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    Path("r.toml").write_text('base = "toy:base"\n[tuned]\ndigits = "toy:digits"\nletters = "toy:letters"\n')
    press_at_call(monkeypatch, probe.StatisticsRun, "write", 2)
    ended = run("measure", "r.toml", "--method", "fisher", "--set", "method.examples=2", "-o", "st")
    assert (ended.status, ended.err) == (
        130,
        "interrupted: 1 of 2 files of statistics are kept; the same command goes on\n",
    )


def test_a_swallowed_ctrl_c_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("a library made this of it")
    interrupts.tell(error, lambda: "all is kept")
    assert interrupts.kept_by(error) == ""
    monkeypatch.setattr(interrupts, "received", signal.SIGINT)
    with pytest.raises(RuntimeError) as raised, interrupts.telling(lambda: "all is kept"):
        raise error
    assert interrupts.kept_by(raised.value) == "all is kept"
