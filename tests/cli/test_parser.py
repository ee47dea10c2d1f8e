"""The global options: before the command and after it."""

from __future__ import annotations

import pytest

from mergecli.cli import COMMANDS, console
from mergecli.runtime import verbosity
from mergecli.runtime.errors import InputError, listed, quoted
from tests.conftest import Run, World

MERGE = ("merge", "t1.safetensors", "t2.safetensors", "--method", "average", "-o", "m.safetensors")


@pytest.mark.parametrize("place", [0, 1, len(MERGE)])
@pytest.mark.parametrize("option", ["-q", "--quiet"])
def test_quiet_leaves_the_data(world: World, run: Run, option: str, place: int) -> None:
    arguments = [*MERGE[:place], option, *MERGE[place:]]
    ended = run(*arguments)
    assert (ended.status, ended.out, ended.err, ended.end) == (0, "m.safetensors\n", "", "")


def test_a_run_does_not_remember_the_options_of_the_one_before(world: World, run: Run) -> None:
    assert run(*MERGE, "-q").end == ""
    assert run(*MERGE).end != ""


def test_quiet_leaves_warnings_and_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbosity, "quiet", True)
    console.note("n")
    console.remark("r")
    console.warning("w")
    console.error("e", "h")
    assert capsys.readouterr().err == "warning: w\nerror: e\nhint: h\n"


def test_quiet_and_verbose_contradict_each_other(run: Run) -> None:
    for arguments in (["-q", "methods", "-v"], ["methods", "-v", "-q"]):
        ended = run(*arguments)
        assert (ended.status, ended.err) == (
            2,
            "error: --quiet: does not go with --verbose\nhint: leave one of them out\n",
        )


@pytest.mark.parametrize("arguments", [["--debug", "info", "x"], ["info", "x", "--debug"]])
def test_debug_shows_the_traceback_of_an_error_that_users_can_mend(run: Run, arguments: list[str]) -> None:
    ended = run(*arguments)
    assert ended.status == 3
    assert ended.err.startswith("Traceback (most recent call last):\n")
    assert "\nerror: x: " in ended.err


def test_details_are_shown_when_they_are_wanted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = InputError("e", "h", details="  a\n  b")
    console.error(error.message, error.hint, error.details)
    console.detail("d")
    assert capsys.readouterr().err == "error: e\n(`--verbose` shows the details)\nhint: h\n"
    monkeypatch.setattr(verbosity, "verbose", True)
    console.error(error.message, error.hint, error.details)
    console.detail("d")
    assert capsys.readouterr().err == "error: e\n  a\n  b\nhint: h\nd\n"


def test_lists_are_cut_until_all_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"n{number}" for number in range(9)]
    assert listed(names, 2) == "  n0\n  n1\n  (and 7 more)"
    assert quoted(names, 2) == "`n0`, `n1` (and 7 more)"
    monkeypatch.setattr(verbosity, "verbose", True)
    assert listed(names, 2) == "\n".join(f"  {name}" for name in names)
    assert quoted(names, 2) == ", ".join(f"`{name}`" for name in names)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_shows_them(run: Run, command: str) -> None:
    shown = run(command, "--help").out
    assert all(f"  {names} " in shown for names in ("-q, --quiet", "-v, --verbose", "--debug"))
