"""Notes are heard by the program, once each, and by nobody else."""

from __future__ import annotations

from mergecli.runtime.notes import heard_by, note


def test_a_note_is_heard_once_inside_the_block_only() -> None:
    heard: list[str] = []
    note("before")
    with heard_by(heard.append):
        note("one")
        note("two")
        note("one")
    note("after")
    assert heard == ["one", "two"]
