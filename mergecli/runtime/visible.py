"""Text from names and files without what a terminal would obey: each such character as its escape, such as `\\x1b`."""

from __future__ import annotations

import re
import unicodedata

_JOINERS = "\u200c\u200d"
"""Inside words of several scripts and inside emoji; they change nothing around them."""
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of Unicode: controls, marks that turn the direction of text, halves of characters, ends of lines."""


def visible(text: str, keep: str = "") -> str:
    """The text with control characters as escapes, but for those in `keep`."""
    if text.isprintable():
        return text
    return "".join(each if each in keep or not _is_hidden(each) else escaped(each) for each in text)


def visible_message(text: str) -> str:
    """A message, whose lists are on lines of their own, indented or in backticks; other ends of lines are some name's."""
    return re.sub(r"\n(?!  |`)", r"\\n", visible(text, keep="\n"))


def escaped(character: str) -> str:
    """`\\n` for the end of a line, `\\x1b` for escape, `\\u202e` for what turns text around."""
    return character.encode("unicode_escape").decode()


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN and character not in _JOINERS
