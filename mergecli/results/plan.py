"""Plans: what a command would read, compute and write, how long that takes and how much memory, as a dry run finds out."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, ParamSpec, cast

from mergecli.results.cells import Cell, Column
from mergecli.results.tables import Table
from mergecli.runtime.dry_run import Planned, dry

Parameters = ParamSpec("Parameters")

Kind = Literal[
    "check", "read", "measure", "learn", "merge", "decode", "head", "evaluate", "train", "validate", "write"
]  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One thing that the command would do. None stands for what does not apply, or is not known before the work."""

    work: Kind
    what: str
    """The model, the task or the method that it is about."""
    file: str | None = None
    """The source that is read, or the file or folder that is written."""
    tensors: int | None = None
    passes: int | None = None
    """How many times it is read from beginning to end."""
    images: int | None = None
    """How many images pass through a tower in all."""
    steps: int | None = None
    """Updates of what is learned; fewer where a method stops early."""
    cached: bool | None = None
    """Whether it is kept from before."""
    bytes: int | None = None
    """Of the file; of what is read several times, of one time."""
    seconds: float | None = None
    """An estimate."""


@dataclass(frozen=True)
class Plan:
    """What a command would do. Time and memory are estimates from a short measurement on this machine."""

    command: str
    work: tuple[Work, ...]
    """In the order in which it is done."""
    memory: int
    """Bytes: the max RSS of the process."""
    measured: float
    """The seconds that the measurement took."""

    @property
    def seconds(self) -> float:
        """Of all work together."""
        return sum(each.seconds or 0.0 for each in self.work)

    @property
    def reads(self) -> int:
        """Bytes that are read in all."""
        return sum((each.bytes or 0) * (each.passes or 1) for each in self.work if each.work == "read")

    @property
    def writes(self) -> int:
        """Bytes that are written to the outputs."""
        return sum(each.bytes or 0 for each in self.work if each.work == "write")

    @property
    def passes(self) -> int:
        """How many times the models are read."""
        return max((each.passes or 0 for each in self.work), default=0)

    def to_json(self) -> dict[str, Any]:
        """The plan as values of JSON; keys that do not apply are left out."""
        return {
            "command": self.command,
            "passes": self.passes,
            "bytes_read": self.reads,
            "bytes_written": self.writes,
            "memory": self.memory,
            "seconds": round(self.seconds, 1),
            "estimated": ["memory", "seconds"],
            "work": [
                {
                    name: round(value, 1) if isinstance(value, float) else value
                    for name in _NAMES
                    if (value := getattr(each, name)) is not None
                }
                for each in self.work
            ],
        }

    @property
    def table(self) -> Table:
        """A row for each piece of work, without the columns that no row fills."""
        used = [name for name in _NAMES if any(getattr(each, name) is not None for each in self.work)]
        columns = tuple(Column(name, _UNITS.get(name, "count")) for name in used)
        return Table(columns, tuple(tuple(_cell(getattr(each, name)) for name in used) for each in self.work))


_NAMES = [each.name for each in fields(Work)]
_UNITS: dict[str, Any] = {
    "work": "text",
    "what": "text",
    "file": "text",
    "cached": "text",
    "seconds": "ratio",
}


def plan(verb: Callable[Parameters, object], *arguments: Parameters.args, **named: Parameters.kwargs) -> Plan:
    """What `verb(...)` would do: everything is checked as for the work itself, and nothing is written or downloaded.

    `mergecli.plan(mergecli.merge, "toy.toml", method="ties", output="out/ties.safetensors")`

    Args:
        verb: `merge`, `evaluate`, `sweep`, `search`, `continual`, `finetune` or `finetune_each`.
        arguments, named: what it is called with.

    Raises:
        MergecliError: as the verb itself.
    """
    began = time.perf_counter()
    with dry():
        try:
            verb(*arguments, **named)
        except Planned as end:
            found = cast("Plan", end.plan)
            checks = Work("check", "", seconds=time.perf_counter() - began - found.measured)
            return replace(found, work=(checks, *found.work))
    raise TypeError(f"{getattr(verb, '__name__', verb)} has no dry run")


def check(
    verb: Callable[Parameters, object], *arguments: Parameters.args, **named: Parameters.kwargs
) -> None:
    """Makes the checks of `verb(...)`, and nothing else; raises what it raises."""
    with dry(measures=False), suppress(Planned):
        verb(*arguments, **named)


def _cell(value: Any) -> Cell:
    return ("yes" if value else "no") if isinstance(value, bool) else value
