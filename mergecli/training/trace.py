"""The trace of a training: losses and accuracies of each step, as a table and in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergecli.results.cells import Cell, Column
from mergecli.results.tables import Table
from mergecli.results.tensorboard import require_tensorboard, write_tensorboard
from mergecli.storage.atomic import check_target, check_targets, write_text
from mergecli.training.settings import Settings


def trace_table(
    tasks: Sequence[str],
    settings: Settings,
    losses: Sequence[Sequence[float]],
    validation: Mapping[int, Sequence[float]],
) -> Table:
    """A row for each step: learning rate, sum of the losses, each task's loss. Where the weights after the step were
    validated: the mean accuracy and each task's."""
    columns = [Column("step", "count"), Column("learning_rate", "number"), Column("loss", "number")]
    columns += [Column(f"loss {task}", "number") for task in tasks]
    if settings.validate_every:
        columns += [Column("accuracy", "percent"), *(Column(f"accuracy {task}", "percent") for task in tasks)]
    rows: list[tuple[Cell, ...]] = []
    for number, step in enumerate(losses):
        row: list[Cell] = [number + 1, settings.learning_rate_at(number), sum(step), *step]
        if settings.validate_every:
            found = validation.get(number + 1)
            row += [None] * (1 + len(tasks)) if found is None else [sum(found) / len(tasks), *found]
        rows.append(tuple(row))
    return Table(tuple(columns), tuple(rows))


@dataclass(frozen=True)
class TraceFiles:
    """Where the trace is written."""

    trace: Path | None
    """A CSV file."""
    tensorboard: Path | None
    """A folder."""

    def check(self, output: Path) -> None:
        """Raises UsageError if one of the files cannot be written, or is the output."""
        if self.trace:
            file = [(output, ())] if output.suffix == ".safetensors" else []
            check_targets([*file, (self.trace, (".csv",))], {})
        if self.tensorboard:
            require_tensorboard()
            check_target(self.tensorboard, folder=True)

    def write(self, table: Table) -> None:
        """Writes the trace to both."""
        if self.trace:
            write_text(self.trace, table.text("csv"))
        if self.tensorboard:
            write_tensorboard(self.tensorboard, table)
