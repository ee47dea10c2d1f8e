"""What chains of merges gave: average accuracy after each step, backward transfer, forgetting, over several orders."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mergecli.results.cells import Cell, Column, Quantity, Unit
from mergecli.results.result import Evaluation, read_result
from mergecli.results.tables import Table, csv_text
from mergecli.runtime.errors import InputError, quoted

_HINT = "name what `mergecli continual -o` wrote: its folder, or `order-*/step-*.json`"


@dataclass(frozen=True)
class ChainScores:
    """One order of one method."""

    name: str
    order: tuple[str, ...]
    steps: tuple[Mapping[str, float], ...]
    """Of each step, task -> accuracy, of the tasks seen so far."""

    def average(self, step: int) -> float:
        """The mean accuracy over the tasks seen so far, after that step."""
        seen = self.order[:step]
        return sum(self.steps[step - 1][task] for task in seen) / len(seen)

    def transfer(self, step: int) -> float:
        """The sum over these tasks of their accuracy after that step, less their accuracy when they had just come."""
        now = self.steps[step - 1]
        return sum(now[task] - self.steps[at][task] for at, task in enumerate(self.order[:step]))

    def forgetting(self, task: str) -> float | None:
        """A task's best accuracy after any step before the last, less that after the last (Chaudhry et al. 2018); None of the
        task that came last."""
        before = [step[task] for step in self.steps[:-1] if task in step]
        return max(before) - self.steps[-1][task] if before else None

    @property
    def mean_forgetting(self) -> float | None:
        """Over all tasks but the last; None of a single step."""
        known = [each for task in self.order if (each := self.forgetting(task)) is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Chains:
    """All orders of one method."""

    label: str
    tasks: tuple[str, ...]
    orders: tuple[ChainScores, ...]

    def over(self, measure: Callable[[ChainScores], float | None]) -> tuple[float | None, float | None]:
        """Mean of a measure over the orders that have it, and its standard deviation (of a sample; None of fewer than two)."""
        known = [each for order in self.orders if (each := measure(order)) is not None]
        mean = sum(known) / len(known) if known else None
        return mean, statistics.stdev(known) if len(known) > 1 else None


_Group = tuple[str, tuple[tuple[str, str], ...], frozenset[str]]
"""Method, settings and tasks, in which all orders of one kind agree."""


def expanded(results: Sequence[str | Path | Evaluation]) -> list[str | Path | Evaluation]:
    """The same with the files of all steps in place of a folder that `continual` wrote.

    Raises:
        InputError: a folder has none.
    """
    found: list[str | Path | Evaluation] = []
    for each in results:
        if isinstance(each, Evaluation) or not Path(each).is_dir():
            found.append(each)
            continue
        files = sorted(Path(each).glob("order-*/step-*.json")) or sorted(Path(each).glob("step-*.json"))
        if not files:
            raise InputError(f"{each}: has no results of a chain", _HINT)
        found += files
    return found


def read_chains(results: Sequence[str | Path | Evaluation]) -> tuple[list[Chains], list[str]]:
    """The chains that results belong to, by method; and warnings of orders whose steps are not all there.

    Raises:
        InputError: a result is none of a chain, two are of one step, or no chain is whole.
    """
    groups: dict[_Group, dict[tuple[str, str], dict[int, Evaluation]]] = {}
    for each in results:
        result = each if isinstance(each, Evaluation) else read_result(each)
        about = result.checkpoint
        chain, order, step = (about.get(key) for key in ("chain", "order", "step"))
        if not chain or not order or not step or not step.isdecimal():
            name = result.name if isinstance(each, Evaluation) else each
            raise InputError(f"{name}: is no result of a chain", _HINT)
        settings = tuple((key, str(text)) for key, text in about.items() if key.startswith("method."))
        group = groups.setdefault((str(about.get("method")), settings, frozenset(order.split(","))), {})
        steps = group.setdefault((chain, order), {})
        if int(step) in steps:
            raise InputError(
                f"two results are step {step} of `{chain}` by `{about.get('method')}`",
                "name each folder once",
            )
        steps[int(step)] = result
    warnings: list[str] = []
    labels = _labels(list(groups))
    found: list[Chains] = []
    for label, group in zip(labels, groups.values(), strict=True):
        whole = [
            scores
            for (chain, order), steps in group.items()
            if (scores := _scores(label, chain, tuple(order.split(",")), steps, warnings))
        ]
        if whole:
            found.append(Chains(label, whole[0].order, tuple(whole)))
    if not found:
        raise InputError(
            f"no chain is whole: {warnings[0]}", "run the same `mergecli continual` again: it goes on"
        )
    return found, warnings


def _labels(keys: Sequence[_Group]) -> list[str]:
    """What each group is called: its method, and the settings in which it differs from others by the same method."""
    found: list[str] = []
    for method, settings, _ in keys:
        own = dict(settings)
        others = [dict(each[1]) for each in keys if each[0] == method]
        differ = [key for key in own if any(other.get(key) != own[key] for other in others)]
        label = " ".join([method, *(f"{key.removeprefix('method.')} {own[key]}" for key in differ)])
        same = sum(each == label or each.startswith(f"{label} (") for each in found)
        found.append(f"{label} ({same + 1})" if same else label)
    return found


def _scores(
    label: str, chain: str, order: tuple[str, ...], steps: Mapping[int, Evaluation], warnings: list[str]
) -> ChainScores | None:
    missing = [number for number in range(1, len(order) + 1) if number not in steps]
    if missing:
        warnings.append(
            f"{label}: `{chain}` lacks {quoted(map(str, missing))} of its {len(order)} steps: left out"
        )
        return None
    scores: list[Mapping[str, float]] = []
    for number in range(1, len(order) + 1):
        tasks = steps[number].tasks
        if lacking := [task for task in order[:number] if task not in tasks]:
            raise InputError(f"{label}: step {number} of `{chain}` has no result on {quoted(lacking)}", _HINT)
        scores.append({task: tasks[task].accuracy for task in order[:number]})
    return ChainScores(chain, order, tuple(scores))


def continual_table(results: Sequence[str | Path | Evaluation]) -> Table:
    """A row a measure: mean and standard deviation over the orders, and the value of each order."""
    chains, warnings = read_chains(results)
    return table_of(chains, warnings)


def table_of(chains: Sequence[Chains], warnings: Sequence[str] = ()) -> Table:
    """The table of chains that are known."""
    names = list(dict.fromkeys(order.name for each in chains for order in each.orders))
    several = len(names) > 1
    columns = [
        Column("method"), Column("measure"), Column("mean", "mixed"), Column("std", "mixed"),
        *(Column(name, "mixed", optional=True) for name in names if several),
    ]  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for each in chains:
        for name, unit, measure in _measures(each):
            mean, spread = each.over(measure)
            own: dict[str, float | None] = {order.name: measure(order) for order in each.orders}
            rows.append(
                (each.label, name, Quantity(mean, unit), Quantity(spread, "percent"),
                 *(Quantity(own.get(order), unit) for order in names if several))
            )  # fmt: skip
    notes = [
        "backward transfer: mean over the tasks of their accuracy at the end less that when they had just come: over all T "
        "(FusionBench), or over the T - 1 that could change (Lopez-Paz and Ranzato 2017)",
        "forgetting: best accuracy before the last step less that after it; std: over the orders, of a sample",
    ]
    return Table(tuple(columns), tuple(rows), notes=tuple(notes), warnings=tuple(warnings))


Measure = Callable[[ChainScores], float | None]


class _Row(NamedTuple):
    """A row of the table."""

    name: str
    unit: Unit
    measure: Measure


def _measures(chains: Chains) -> list[_Row]:
    """The rows of one method."""
    last = len(chains.tasks)

    def after(step: int) -> Measure:
        return lambda each: each.average(step)

    def forgotten(task: str) -> Measure:
        return lambda each: each.forgetting(task)

    def transfer(steps: int) -> Measure:
        return lambda each: each.transfer(last) / steps

    def mean_forgetting(each: ChainScores) -> float | None:
        return each.mean_forgetting

    rows: list[_Row] = [
        _Row(f"average accuracy, step {step}", "percent", after(step)) for step in range(1, last + 1)
    ]
    rows.append(_Row("backward transfer / T", "points", transfer(last)))
    if last > 1:
        rows.append(_Row("backward transfer / (T-1)", "points", transfer(last - 1)))
        rows.append(_Row("forgetting", "points", mean_forgetting))
        rows += [_Row(f"forgetting of {task}", "points", forgotten(task)) for task in chains.tasks]
    return rows


def steps_csv(chains: Sequence[Chains]) -> str:
    """A row a step, a column a task, as FusionBench's CSV files of models have them: `model_name`, then fractions; nothing where a
    task was not seen yet."""
    tasks = list(dict.fromkeys(task for each in chains for task in each.tasks))
    rows: list[list[str | float | None]] = [["model_name", *tasks]]
    for each in chains:
        for order in each.orders:
            for number, step in enumerate(order.steps, 1):
                name = f"{each.label.replace(' ', '_')}_{order.name}_step_{number}"
                rows.append([name, *(step.get(task) for task in tasks)])
    return csv_text(rows, repr)
