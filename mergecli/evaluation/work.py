"""What a worker does with a unit of an evaluation, and what it keeps for the units that come after."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from mergecli.evaluation.scoring import Scoring
from mergecli.evaluation.settings import Settings, Tower
from mergecli.formats.mixture import LEFT_OUT
from mergecli.formats.opening import open_source
from mergecli.formats.projection import own_encoder
from mergecli.hub.fetched import expect_all
from mergecli.runtime.engines.contract import Unit
from mergecli.runtime.engines.worker import node
from mergecli.runtime.errors import InputError
from mergecli.storage.sources import Source

if TYPE_CHECKING:
    from mergecli.data.tasks import Task
    from mergecli.storage.checkpoint import Checkpoint

_MOST = 64
"""Towers that a worker keeps open: files, not weights."""


class Towers(Protocol):
    """What opens the towers of a grid, in whatever process; it can be pickled."""

    @property
    def needed(self) -> Iterable[Source]:
        """What must be on a machine that opens them."""
        ...

    def open(self, name: str, stack: ExitStack, /) -> Tower:
        """The tower, open until `stack` ends."""
        ...

    def leave(self) -> None:
        """Removes what was put on this machine."""
        ...


@dataclass(frozen=True)
class OpenedTowers:
    """The towers of checkpoints that are there."""

    base: Source
    sources: Mapping[str, Source]

    @property
    def needed(self) -> Iterable[Source]:
        return self.sources.values()

    def leave(self) -> None:
        pass

    def open(self, name: str, stack: ExitStack) -> Tower:
        source = self.sources[name]
        opened = stack.enter_context(open_source(source, self.base))
        with open_source(self.base) as whole:
            return opened_tower(name, source, opened, whole)


def opened_tower(name: str, source: Source, opened: Checkpoint, whole: Checkpoint) -> Tower:
    """The image encoder of an open checkpoint, as it differs from that of a `whole` CLIP; raises InputError if something of it
    is missing."""
    opened = own_encoder(opened, whole)
    if left_out := opened.metadata.get(LEFT_OUT):
        raise InputError(
            f"{source}: is a tower without {left_out}, which the method's accuracy comes from",
            "evaluate the whole file, on this task with `--task`",
        )
    return Tower(name, source.label, opened)


@dataclass(frozen=True)
class CountingWork:
    """Counts one tower on one task, wherever it is called."""

    towers: Towers
    clip: Source
    tasks: Mapping[str, Task]
    settings: Settings
    several: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells the work of one command from that of another in the same worker."""

    @property
    def device(self) -> str:
        return self.settings.device

    def expect_sources(self) -> None:
        expect_all([self.clip, *self.towers.needed], tasks=self.tasks.values())

    def leave(self) -> None:
        self.towers.leave()

    def __call__(self, unit: Unit) -> bytes:
        session = _session(self)
        name, task = unit.of
        scoring, tower = session.scoring, session.tower(name)
        of_task = scoring.images(self.tasks[task])
        if scoring.unit_of(of_task, tower) != unit:
            raise InputError(
                f"{unit.name}: on {node()} the models or data are others than where the command was started",
                "name paths that all machines see, or fetch the recipe on each with the same lock",
            )
        found: list[bytes] = []
        scoring.count(
            of_task, [(unit, tower)], lambda _, content, __: found.append(content), several=self.several
        )
        return found[0]


class _Session:
    """The CLIP, the images and the towers of one command."""

    def __init__(self, work: CountingWork) -> None:
        self.id = work.id
        self.scoring = Scoring(work.clip, work.settings)
        self._towers = work.towers
        self._open: dict[str, tuple[Tower, ExitStack]] = {}

    def tower(self, name: str) -> Tower:
        """The tower; the same object as long as it is open."""
        if name not in self._open:
            if len(self._open) >= _MOST:
                self._open.pop(next(iter(self._open)))[1].close()
            with ExitStack() as stack:
                tower = self._towers.open(name, stack)
                self.scoring.check(tower, ())
                self._open[name] = tower, stack.pop_all()
        return self._open[name][0]

    def close(self) -> None:
        """Closes the towers."""
        for _, stack in self._open.values():
            stack.close()


_sessions: list[_Session] = []
"""That of the last command, if there was one."""


def _session(work: CountingWork) -> _Session:
    if not _sessions or _sessions[0].id != work.id:
        while _sessions:
            _sessions.pop().close()
        _sessions.append(_Session(work))
    return _sessions[0]
