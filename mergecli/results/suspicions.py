"""Results of models that were, or seem to be, trained on the test images, and averages without those tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mergecli.data.contamination import findings, implausible, is_test
from mergecli.data.tasks import digest, find
from mergecli.results.cells import Cell, Column, Estimate
from mergecli.results.result import Evaluation
from mergecli.results.rows import Block, Metric, Row, head_of
from mergecli.results.statistics import mean_interval, wilson
from mergecli.runtime.errors import quoted


class Suspicion(NamedTuple):
    """A task on which some results mean little, and why."""

    task: str
    text: str


def suspicions(evaluations: Sequence[Evaluation]) -> list[Suspicion]:
    """One for each known group of checkpoints that results are of, then one for each task that results are too good on."""
    return [*_known(evaluations), *too_good(evaluations)]


def _known(evaluations: Sequence[Evaluation]) -> Iterator[Suspicion]:
    found: dict[Suspicion, list[str]] = {}
    for each in evaluations:
        path, own = each.checkpoint.get("path"), each.checkpoint.get("digest")
        tested = [task for task, score in each.tasks.items() if is_test(task, score.split)]
        for finding in findings([path or "", *each.models.values()], [own or ""], tested):
            found.setdefault(Suspicion(finding.group.task, finding.text), []).append(each.name)
    for (task, text), names in found.items():
        yield Suspicion(task, f"{quoted(names)}: {text}")


def too_good(evaluations: Sequence[Evaluation]) -> Iterator[Suspicion]:
    """One for each task on which results are better than any clean model is known to be."""
    for task, (above, why) in implausible().items():
        classes = digest(find(task).classes or ())
        names = [
            each.name
            for each in evaluations
            if (score := each.tasks.get(task))
            and (score.classes == classes and is_test(task, score.split))
            and wilson(score.correct, score.images).low > above
        ]
        if names:
            what = f"more than {100 * above:.0f} % on `{task}`, which suggests training on its test images"
            yield Suspicion(task, f"{quoted(names)}: {what}: {why}")


def block(rows: Sequence[Row], found: Sequence[Suspicion], metric: Metric, intervals: bool) -> Block:
    """The warnings, and a column with the average of the other tasks."""
    tasks = list(dict.fromkeys(each.task for each in found))
    clean = [[task for task in row.values if task not in tasks] for row in rows]
    columns: list[tuple[Column, list[Cell]]] = []
    if found and any(clean):
        cells = [_mean(row, others, intervals) for row, others in zip(rows, clean, strict=True)]
        columns.append((head_of(f"average (without {', '.join(tasks)})", metric), cells))
    return Block(columns, warnings=[each.text for each in found])


def _mean(row: Row, tasks: Sequence[str], intervals: bool) -> Cell:
    if not tasks:
        return None
    mean = sum(row.values[task] for task in tasks) / len(tasks)
    return Estimate(mean, *mean_interval(row.counts(tasks))) if intervals and row.result else mean
