"""Messages: warnings and notes from the first process, errors from each."""

from __future__ import annotations

import pytest

from mergecli.cli import console


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        ("0", "warning: w\nnote: n\nerror: e\nhint: h\n"),
        ("1", "process 1: error: e\nprocess 1: hint: h\n"),
    ],
)
def test_of_several_processes_the_first_one_talks_and_each_says_its_own_error(
    rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    console.warning("w")
    console.note("n")
    console.error("e", "h")
    assert capsys.readouterr().err == said
