"""Control characters as escapes; everything else as it is."""

from __future__ import annotations

import pytest

from mergecli.runtime.visible import visible, visible_message


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"), ("a\nb\tc\rd", r"a\nb\tc\rd"), ("\x9b31m\x7f\x00", r"\x9b31m\x7f\x00"),
        ("\u202egnp.exe", r"\u202egnp.exe"), ("a\u2028b", r"a\u2028b"), ("\udcff", r"\udcff"), ("\U000e0041", r"\U000e0041"),
        ("\ufeffa", r"\ufeffa"),
    ],
)  # fmt: skip
def test_what_a_terminal_would_obey_is_shown_as_its_escape(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    "text", ["", "ties[b] :x: [/b]", "naïve 日本語 ±½", "👩\u200d🔬", "a\u00a0b\u3000c", "\\x1b"]
)
def test_all_other_text_is_as_it_is(text: str) -> None:
    assert visible(text) == text


def test_characters_can_be_kept() -> None:
    assert visible("a\n\t\x1b", keep="\n\t") == "a\n\t\\x1b"


def test_a_message_keeps_the_lines_of_its_lists_and_no_others() -> None:
    assert visible_message("two problems:\n  one\n`x`: two") == "two problems:\n  one\n`x`: two"
    assert visible_message("m\nerror: forged\n\n  x\n") == r"m\nerror: forged\n" + "\n  x\\n"
