"""What a unit of work is, what an engine does with it, and how a user chooses one."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mergecli.runtime.counts import count
from mergecli.runtime.errors import UsageError, did_you_mean

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Unit:
    """One piece of work that can run anywhere."""

    of: tuple[str, ...]
    """What it is about: a checkpoint or a point of a sweep, and a task; or a task."""
    key: str
    """32 hex digits of all that its result depends on."""

    @property
    def name(self) -> str:
        """What messages call it: `ties on digits`."""
        return " on ".join(self.of)


@dataclass(frozen=True)
class Report:
    """What came back of a unit."""

    result: bytes
    node: str
    device: str
    seconds: float
    warnings: tuple[str, ...] = ()
    """Said where it ran, to be said by the caller."""


class Work(Protocol):
    """What a unit runs: a value that can be pickled. It is a pure function, so that it may be called again anywhere."""

    @property
    def device(self) -> str:
        """Where it computes: `cpu`, `cuda`."""
        ...

    def expect_sources(self) -> None:
        """Raises InputError if this machine lacks models or data."""
        ...

    def leave(self) -> None:
        """Called on each machine when nothing is left to do: removes what the work has put there."""
        ...

    def __call__(self, unit: Unit, /) -> bytes: ...


class LostWorkerError(Exception):
    """The process or the machine that had a unit has gone."""


class Running(Protocol):
    """A unit that was submitted, as `concurrent.futures.Future`."""

    def result(self) -> Report:
        """Raises LostWorkerError, or what the unit raised."""
        ...


R = TypeVar("R", bound=Running)


class Executor(Protocol[R]):
    """An engine at work, in the shape of `concurrent.futures.Executor`."""

    @property
    def slots(self) -> int:
        """How many units are worth submitting at a time."""
        ...

    @property
    def retries(self) -> int:
        """How often the caller should submit a unit again whose worker was lost."""
        ...

    def serving(self, work: Work, /) -> AbstractContextManager[None]:
        """A block in which units of this work are submitted. At its end none of them runs, and the machines are left as they were.

        Raises:
            InputError: a machine cannot do the work.
        """
        ...

    def submit(self, work: Work, unit: Unit, /) -> R: ...

    def wait(self, running: Collection[R], /) -> Collection[R]:
        """Those that have ended: at least one."""
        ...

    def shutdown(self) -> None:
        """Ends the workers, and whatever still runs."""
        ...


@dataclass(frozen=True)
class Engine:
    """Which engine runs the units of a command, how, and which of them."""

    name: str = "local"
    """`local`: processes of this machine; `ray`: a Ray cluster."""
    jobs: int | None = None
    """Processes of the local engine: 1, or one for each GPU."""
    gpus: str | None = None
    """GPUs of this machine that the local engine gives a process each: `all`, or numbers such as `0,1`."""
    address: str | None = None
    """Of the Ray cluster: `auto`, `HOST:PORT`, else RAY_ADDRESS; without any, Ray starts on this machine."""
    gpus_per_unit: float | None = None
    """GPUs that Ray gives a unit; a fraction lets several share one. 1 if `device` is a GPU, else 0."""
    cpus_per_unit: int | None = None
    """Processors of a unit, and its threads. By default the local engine divides them among its processes; of Ray 1."""
    retries: int = 3
    """How often a unit is tried again whose worker was lost."""
    part: str | None = None
    """`I/N`: do part I of N of the units only, and put nothing together."""
    collect: bool = False
    """Do no unit: put together what others have done."""
    keep_going: bool = False
    """Go on after a unit that fails, and tell at the end which have."""

    def __post_init__(self) -> None:
        """Raises UsageError if the settings are wrong, or do not go together."""
        if self.name not in ENGINES:
            near = did_you_mean(self.name, ENGINES)
            raise UsageError(f"--engine: expected one of {', '.join(ENGINES)}, got `{self.name}`{near}")
        for option, least, value in (
            ("--jobs", 1, self.jobs), ("--cpus-per-unit", 1, self.cpus_per_unit), ("--retries", 0, self.retries),
        ):  # fmt: skip
            if value is not None:
                count(option, value, least)
        per_unit = self.gpus_per_unit
        if per_unit is not None and not (0 <= per_unit <= 1 or (per_unit > 0 and per_unit == int(per_unit))):
            raise UsageError(
                f"--gpus-per-unit: expected a fraction such as 0.5, or a whole number, got {per_unit:g}"
            )
        others = {"local": {"--address": self.address, "--gpus-per-unit": per_unit}, "ray": {"--jobs": self.jobs, "--gpus": self.gpus}}  # fmt: skip
        for option, value in others[self.name].items():
            if value is not None:
                other = "ray" if self.name == "local" else "local"
                raise UsageError(f"{option}: belongs to `--engine {other}`, the engine is {self.name}")
        if self.gpus is not None and self.gpus != "all" and not re.fullmatch(r"\d+(,\d+)*", self.gpus):
            raise UsageError(f"--gpus: expected `all`, or numbers such as `0,1`, got `{self.gpus}`")
        _ = self.share
        if self.part and self.collect:
            raise UsageError("--collect: puts together what all parts have done, and does not go with --part")

    @property
    def share(self) -> tuple[int, int]:
        """Which part of how many; 1 of 1 without `part`.

        Raises:
            UsageError: there is no such part.
        """
        if self.part is None:
            return 1, 1
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.part)
        number, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= count:
            raise UsageError(
                f"--part: expected I/N with I from 1 to N, such as 1/4, got `{self.part}`",
                "arrays of Slurm that begin at 0 add one: `--part $((SLURM_ARRAY_TASK_ID + 1))/$SLURM_ARRAY_TASK_COUNT`"
                if found and number == 0
                else "",
            )
        return number, count

    @property
    def is_this_process(self) -> bool:
        """Whether the units run in the caller's own process, where one that fails ends the others."""
        return self.name == "local" and self.gpus is None and (self.jobs or 1) == 1 and not self.keep_going

    def device(self, given: str) -> str:
        """The device of a unit: `--gpus` means `cuda`."""
        given = str(given)  # it may be a `torch.device`
        return "cuda" if self.gpus is not None and given == "cpu" else given


def part_of(units: Sequence[Unit], weights: Sequence[int], share: tuple[int, int]) -> list[Unit]:
    """Part I of N of the units: neighbors, of about the same weight together. Each unit is in one part."""
    number, count = share
    total = sum(weights) or 1
    found: list[Unit] = []
    before = 0
    for unit, weight in zip(units, weights, strict=True):
        middle = 2 * before + weight
        if min(count, middle * count // (2 * total) + 1) == number:
            found.append(unit)
        before += weight
    return found
