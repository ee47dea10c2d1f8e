"""`README.md` as a file with two owners: the front matter and the marked section that this program writes, and all that the
user has written.

    ---
    license: mit                                          a key that its owner has set or changed stays
    ---
    text of the owner
    <!-- mergecli:begin of=ties.safetensors section=1a2b3c4d license=5e6f7a8b -->
    the section, which is written anew
    <!-- mergecli:end -->
    text of the owner

The mark at the beginning says of which model the section is, and has digests of what was written, so that what has been
changed since is known.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, unquote

from mergecli.runtime.errors import InputError, UsageError, quoted
from mergecli.runtime.notes import note
from mergecli.storage.atomic import write_text

CARD = "README.md"
_FRONT = re.compile(r"\s*---[ \t]*\n(.*?)(?:^|\n)---[ \t]*(?:\n|$)", re.DOTALL)
_BEGIN = re.compile(r"<!-- mergecli:begin of=(\S+)((?: [\w-]+=[0-9a-f]+)*) -->\n")
_END = "<!-- mergecli:end -->"
_LONGEST = 1 << 20
"""Bytes of a card; what is longer is none."""


@dataclass(frozen=True)
class CardFile:
    """What is in a `README.md`."""

    path: Path
    block: str = ""
    """The lines of the front matter, as they are written."""
    before: str = ""
    section: str | None = None
    """What stands between the marks; None if there are none."""
    after: str = ""
    describes: str = ""
    """The file that the section is about, or `.` for the folder."""
    digests: Mapping[str, str] = field(default_factory=dict[str, str])
    """`section`, and each key of the front matter that was written here -> digest of what it was."""

    @classmethod
    def read(cls, path: Path) -> CardFile:
        """The card in the file; an empty one if there is none.

        Raises:
            InputError: it cannot be read, or is no text.
        """
        try:
            content = path.read_bytes()[: _LONGEST + 1]
            if len(content) > _LONGEST:
                raise ValueError(f"it has more than {_LONGEST:,} bytes")
            text = content.decode("utf-8-sig").replace("\r\n", "\n")
        except (FileNotFoundError, NotADirectoryError):
            return cls(path)
        except OSError as error:
            raise InputError(f"{path}: cannot read: {(error.strerror or '').lower()}") from error
        except ValueError as error:
            raise InputError(f"{path}: is not a model's card: {error}") from error
        front = _FRONT.match(text)
        block, body = (front[1], text[front.end() :]) if front else ("", text)
        begin = _BEGIN.search(body)
        end = body.rfind(_END)
        if not begin or end < begin.end():
            return cls(path, block, body)
        digests = dict(each.split("=") for each in begin[2].split())
        after = body[end + len(_END) :].removeprefix("\n")
        return cls(
            path, block, body[: begin.start()], body[begin.end() : end], after, unquote(begin[1]), digests
        )

    @property
    def front(self) -> dict[str, Any]:
        """The front matter.

        Raises:
            InputError: it is no table in YAML.
        """
        import yaml

        try:
            values = yaml.safe_load(self.block)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            where = getattr(error, "problem_mark", None)
            line = f", line {where.line + 2}" if where else ""
            raise InputError(f"{self.path}{line}: the front matter is not YAML") from error
        if values is not None and not isinstance(values, dict):
            raise InputError(f"{self.path}: the front matter is not a table")
        return {str(key): value for key, value in cast("dict[Any, Any]", values or {}).items()}

    def check(self) -> None:
        """Raises UsageError if the section was edited, and InputError if the front matter cannot be read: found before
        the work."""
        self._kept({})
        if self.section is not None and self.digests.get("section") != _digest(self.section):
            raise UsageError(
                f"{self.path}: the part between the marks `mergecli:begin` and `mergecli:end` was edited, and would be lost",
                "move your text before or after the marks, or leave the card as it is with `--no-card`",
            )

    def updated(self, front: Mapping[str, Any], section: str, describes: str) -> CardFile:
        """The card with this section, and with these keys of the front matter but for those that its owner has set; of None
        is a key that was written before and no longer is."""
        own = self._kept(front)
        blocks = _chunks(self.block)
        for key in front:
            if key not in own:
                blocks[key] = "" if front[key] is None else _yaml({key: front[key]})
        digests = {
            key: digest for key, digest in self.digests.items() if key not in front and key != "section"
        }
        digests |= {key: _digest(front[key]) for key in front if key not in own and front[key] is not None}
        return replace(
            self, block="".join(blocks.values()), section=section, describes=describes,
            digests={"section": _digest(section), **digests},
        )  # fmt: skip

    def _kept(self, front: Mapping[str, Any]) -> set[str]:
        """The keys that the file's owner has set or changed."""
        there = self.front
        return {key for key in front if key in there and self.digests.get(key) != _digest(there[key])}

    @property
    def text(self) -> str:
        """The whole file."""
        block = f"---\n{self.block.rstrip()}\n---\n" if self.block.strip() else ""
        if self.section is None:
            return block + self.before
        marks = "".join(f" {key}={digest}" for key, digest in self.digests.items())
        before = f"{self.before.rstrip()}\n\n" if self.before.strip() else "\n"
        after = f"\n{self.after.lstrip()}" if self.after.strip() else ""
        return f"{block}{before}<!-- mergecli:begin of={quote(self.describes)}{marks} -->\n{self.section}{_END}\n{after}"

    def write(self, front: Mapping[str, Any], section: str, describes: str) -> None:
        """Writes the card with this section and front matter, and says which keys stay as their owner has them."""
        there = self.front
        differing = [key for key in self._kept(front) if front[key] is not None and there[key] != front[key]]
        write_text(self.path, self.updated(front, section, describes).text)
        if differing:
            note(
                f"{self.path}: {quoted(sorted(differing))} {'stays' if len(differing) == 1 else 'stay'} as you wrote it"
            )


def _digest(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:8]


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000)


def _chunks(block: str) -> dict[str, str]:
    """The lines of each key at the top of a front matter, in order; lines of comments are chunks of their own."""
    found: dict[str, str] = {}
    name = "#0"
    for number, line in enumerate(block.splitlines(keepends=True)):
        key = re.match(r"(['\"]?)([^\s#'\":-][^'\":]*)\1[ \t]*:(?:\s|$)", line)
        if key:
            name = key[2].strip()
        elif line.startswith("#"):
            name = f"#{number}"
        found[name] = found.get(name, "") + (line if line.endswith("\n") else f"{line}\n")
    return found
