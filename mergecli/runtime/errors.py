"""Every kind of failure that mergecli reports, and the exit status each one means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

from mergecli.runtime import verbosity


class ExitStatus(IntEnum):
    """What each exit status of the program promises."""

    DONE = 0
    BUG = 1
    """A bug in mergecli: the traceback is shown, and where to report it."""
    USAGE = 2
    """A wrong flag or recipe; nothing was touched."""
    INPUT = 3
    """A file is missing, damaged, does not fit, or cannot be written."""
    HUB = 4
    """The hub or the network."""
    THRESHOLD = 5
    """A `--min-*` threshold was not met."""
    INTERRUPTED = 130
    """Ctrl-C; nothing partial is left."""


class MergecliError(Exception):
    """A failure the user can mend: `message` says what and where, `hint` the cure, `details` what few want to know."""

    status = ExitStatus.INPUT

    def __init__(self, message: str, hint: str = "", details: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class MergecliWarning(UserWarning):
    """Something a user should know that stops nothing; the program prints it on stderr."""


class UsageError(MergecliError):
    """A wrong flag, argument or recipe; found before anything is touched."""

    status = ExitStatus.USAGE


class InputError(MergecliError):
    """A file that is missing, damaged, does not fit the others, or cannot be written."""

    status = ExitStatus.INPUT


class HubError(MergecliError):
    """A hub that cannot be reached or refuses."""

    status = ExitStatus.HUB


class ThresholdError(MergecliError):
    """A result below a `--min-*` threshold."""

    status = ExitStatus.THRESHOLD


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known name that is most like this one, or an empty string; case, `-` and `_` make no difference."""
    plain = {_plain(each): each for each in known}
    name = _SHORT_FORMS.get(name, name)
    near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=cutoff)
    return plain[near[0]] if near else ""


_SHORT_FORMS = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean `x`?)` for the nearest known name, or an empty string."""
    near = nearest(name, known)
    return f" (did you mean `{near}`?)" if near else ""


def _plain(name: object) -> str:
    return str(name).lower().replace("-", "_")


def listed(lines: Sequence[str], limit: int = 5) -> str:
    """The lines, each indented on its own line, cut at `limit` with how many more there are, unless all are wanted."""
    if verbosity.verbose:
        limit = len(lines)
    shown = [f"  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  (and {len(lines) - limit} more)")
    return "\n".join(shown)


def quoted(names: Iterable[str], limit: int = 8) -> str:
    """`a`, `b`, `c` ... cut at `limit` with how many more there are, unless all are wanted."""
    every = list(names)
    if verbosity.verbose:
        limit = len(every)
    shown = ", ".join(f"`{name}`" for name in every[:limit])
    return shown + (f" (and {len(every) - limit} more)" if len(every) > limit else "")


def either(names: Sequence[str]) -> str:
    """`a`, `b` or `c`, as words."""
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names)


def toml_text(value: Any) -> str:
    """A value as TOML, for messages and metadata."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_text(each) for each in value) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {toml_text(each)}" for key, each in value.items()) + " }"
    return str(value)


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else toml_text(key)
