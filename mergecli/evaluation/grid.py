"""Towers times tasks as units: which of them have a file, how the others get one, and the scores that all files hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergecli.evaluation.scoring import Scores, Scoring, add
from mergecli.evaluation.settings import Tower
from mergecli.runtime import interrupts
from mergecli.runtime.engines.contract import Engine, Unit, Work, part_of
from mergecli.runtime.engines.grid import Failure, run_grid
from mergecli.runtime.engines.worker import report_of
from mergecli.runtime.errors import InputError, UsageError, listed
from mergecli.runtime.notes import note

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from mergecli.data.images import TaskImages
    from mergecli.runtime.progress import Progress
    from mergecli.storage.units import UnitFiles


@dataclass
class Grid:
    """The units of an evaluation."""

    scoring: Scoring
    tasks: Mapping[str, TaskImages]
    units: Mapping[tuple[str, str], Unit]
    """(tower, task) -> unit, one tower after another."""
    files: UnitFiles
    several: bool
    """Whether there are several towers."""

    def has(self, unit: Unit) -> bool:
        """Whether the unit's file is there, whole, and of these labels."""
        return self.scoring.read(unit, self.tasks[unit.of[1]], self.files, several=self.several) is not None

    def scores(self, predictions: bool = False) -> dict[str, Scores]:
        """Tower -> its scores, of those towers all of whose units have a file."""
        found: dict[str, Scores] = {}
        for (tower, task), unit in self.units.items():
            counted = self.scoring.read(unit, self.tasks[task], self.files, several=self.several)
            scores = found.setdefault(tower, Scores())
            if counted is None:
                scores.missing.append(task)
            else:
                add(scores, self.tasks[task], counted, self.scoring.settings, tower if predictions else "")
        return {tower: scores for tower, scores in found.items() if not scores.missing}

    def logits(self, unit: Unit) -> Tensor:
        """(N, C) the logits in the unit's file, which is there.

        Raises:
            InputError: it is there no more.
        """
        found = self.files.read(unit, lambda stored: stored.read("logits"))
        if found is None:
            raise InputError(f"{self.files.path(unit)}: is gone, or damaged", "give the same command again")
        return found

    def kept(self) -> str:
        """What is kept after an interruption."""
        count = sum(self.files.path(unit).exists() for unit in self.units.values())
        one = len({tower for tower, _ in self.units}) == 1 or len(self.units) == len(self.tasks)
        what = "tasks" if one else "tasks of all checkpoints"
        return f"{count} of {len(self.units)} {what} are kept" if count else ""

    def count(self, units: Sequence[Unit], towers: Mapping[str, Tower], progress: Progress | None) -> None:
        """Counts units of open towers in this process, task by task."""
        device = self.scoring.settings.device

        def save(unit: Unit, content: bytes, seconds: float) -> None:
            self.files.save(unit, report_of(content, device, seconds))

        for task, of_task in self.tasks.items():
            own = [(unit, towers[unit.of[0]]) for unit in units if unit.of[1] == task]
            every = [of for of in self.units if of[1] == task and of[0] in towers]
            if every:
                done = len(every) - len(own)
                self.scoring.count(of_task, own, save, several=self.several, done=done, progress=progress)


def check_share(engine: Engine, folder: Path | None) -> None:
    """Raises UsageError if parts of the units are to be done or collected, and there is no folder where they meet."""
    option = "--part" if engine.part else "--collect" if engine.collect else None
    if option and folder is None:
        raise UsageError(f"{option}: the parts meet in a folder", "name it with `-o DIR`")


def fill(
    grid: Grid,
    engine: Engine,
    work: Work,
    count_here: Callable[[list[Unit]], None],
    progress: Progress | None,
    window: int,
) -> list[Failure]:
    """Makes the files of the grid's units that have none: `count_here` in this process, or by an engine.

    Args:
        window: so many towers are worked on at a time.

    Raises:
        InputError: files are missing that should only be collected.
    """
    every = list(grid.units.values())
    weights = [len(grid.tasks[unit.of[1]].images) for unit in every]
    wanted = part_of(every, weights, engine.share)
    if grid.scoring.settings.fresh:
        grid.files.forget(wanted)
    missing = [unit for unit in wanted if not grid.has(unit)]
    if engine.part:
        done = f", {len(wanted) - len(missing)} of them done before" if len(missing) < len(wanted) else ""
        note(f"part {engine.part}: {len(wanted)} of {len(every)} units{done}")
    if engine.collect:
        if missing:
            raise InputError(
                f"{len(missing)} of {len(every)} units are missing:\n{listed([unit.name for unit in missing], 20)}",
                "run the parts that they belong to again, or the same command without `--collect`",
            )
        return []
    with interrupts.telling(grid.kept):
        if engine.is_this_process:
            count_here(missing)
            return []
        return run_grid(work, interleaved(missing, window), engine, grid.files.save, grid.has, progress)


def interleaved(units: Sequence[Unit], window: int) -> list[Unit]:
    """The units in an order in which neighbors are of different towers and tasks, so that workers which begin together do not
    wait for the same images or the same merge."""
    towers = list(dict.fromkeys(unit.of[0] for unit in units))
    tasks = list(dict.fromkeys(unit.of[1] for unit in units))
    by = {unit.of: unit for unit in units}
    found: list[Unit] = []
    for start in range(0, len(towers), window):
        some = towers[start : start + window]
        for turn in range(len(tasks)):
            cells = [(tower, tasks[(number + turn) % len(tasks)]) for number, tower in enumerate(some)]
            found += [by[cell] for cell in cells if cell in by]
    return found
