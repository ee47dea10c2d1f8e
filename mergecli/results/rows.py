"""The rows of a report, and its columns of accuracies or losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from mergecli.results.cells import Cell, Column, Estimate, number_in
from mergecli.results.result import FINE_TUNED, Evaluation, TaskScore
from mergecli.results.statistics import Count, mean_interval, wilson
from mergecli.runtime.errors import UsageError, did_you_mean, quoted

Metric = Literal["accuracy", "loss"]
METRICS: tuple[Metric, ...] = ("accuracy", "loss")


@dataclass(frozen=True)
class Row:
    """A model, ours or published."""

    name: str
    method: str | None
    values: Mapping[str, float]
    """Task -> accuracy (a fraction) or loss."""
    average: float
    result: Evaluation | None = None
    """None for a published row."""
    seen: tuple[str, ...] = ()
    """Tasks whose models were merged; empty if unknown."""
    averages: Mapping[str, float] | None = None
    """Printed averages over the `seen` and `unseen` tasks of a published row."""

    def mean(self, part: str) -> float | None:
        """The average over its `seen` or `unseen` tasks; None if there are none."""
        if self.averages is not None and part in self.averages:
            return self.averages[part]
        chosen = [self.values[task] for task in self.tasks(part)]
        return sum(chosen) / len(chosen) if chosen else None

    def tasks(self, part: str) -> list[str]:
        """Its `seen` or `unseen` tasks."""
        return [task for task in self.values if self.seen and (task in self.seen) == (part == "seen")]

    def counts(self, tasks: Iterable[str]) -> list[Count]:
        """Correct predictions and images of those tasks."""
        scores = self.result.tasks if self.result else {}
        return [Count(scores[task].correct, scores[task].images) for task in tasks]


Kind = Literal["merge", "model", "base", "ceiling", "published"]
"""What the row of a report is: a merge; a model that was merged or trained, or several together; the pre-trained base; the fine-tuned models,
each on its own task; or a row of a published table."""


def kinds_of(rows: Sequence[Row]) -> tuple[Kind, ...]:
    """What each row is. A model of which nothing is known counts as a merge."""
    merges = [row.result for row in rows if row.result and not row.result.is_ensemble]
    inputs = {source for result in merges for source in result.models.values()}

    def kind_of(row: Row) -> Kind:
        if row.result is None:
            return "published"
        if FINE_TUNED in (row.result.name, row.method):
            return "ceiling"
        if row.method == "pretrained":
            return "base"
        if row.result.is_ensemble:
            return "model"
        trained = (row.method or "").startswith("finetune")
        return "model" if trained or row.result.checkpoint.get("path") in inputs else "merge"

    return tuple(kind_of(row) for row in rows)


def best_of(columns: Sequence[tuple[Column, Sequence[Cell]]], kinds: Sequence[Kind]) -> set[tuple[int, int]]:
    """(row, column) of the best number of each column: of the merges, or of single models where there are no merges."""
    rivals = [row for row, kind in enumerate(kinds) if kind == ("merge" if "merge" in kinds else "model")]
    found: set[tuple[int, int]] = set()
    for place, (column, cells) in enumerate(columns):
        known = {row: number for row in rivals if (number := number_in(cells[row])) is not None}
        if column.better and len(known) > 1:
            best = max(known.values()) if column.better == "higher" else min(known.values())
            found |= {(row, place) for row, number in known.items() if number == best}
    return found


class Block(NamedTuple):
    """Neighboring columns, each with a cell per row, and their footnotes."""

    columns: Sequence[tuple[Column, list[Cell]]] = ()
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    in_short: Mapping[str, Sequence[str]] = {}
    """A line -> those of the warnings that it stands for where there is little room."""


def rows_of(
    evaluations: Sequence[Evaluation], metric: Metric = "accuracy", seen: Sequence[str] = ()
) -> list[Row]:
    """A row for each result, in order; `seen` is for all of them, by default each result's own merged models."""
    rows: list[Row] = []
    for each in evaluations:
        values = {task: float(getattr(score, metric)) for task, score in each.tasks.items()}
        method, on = each.checkpoint.get("method"), each.checkpoint.get("selected_on")
        average = float(getattr(each.average, metric))
        name = f"{each.name}, chosen on {on}" if on else each.name
        rows.append(Row(name, method, values, average, each, tuple(seen) or _merged(each)))
    return rows


def _merged(result: Evaluation) -> tuple[str, ...]:
    """The tasks whose models were merged, if the result records them and has other tasks too."""
    merged = tuple(task for task in result.tasks if task in result.models)
    return merged if 0 < len(merged) < len(result.tasks) else ()


def tasks_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """Every task, in the order of their first appearance."""
    return list(dict.fromkeys(task for each in evaluations for task in each.tasks))


def chosen_tasks(written: Sequence[str], tasks: Sequence[str], option: str) -> tuple[str, ...]:
    """The tasks with these names, with `-` or `_`, in upper or lower case.

    Raises:
        UsageError: one of them is in no result.
    """
    spelled = {_plain(task): task for task in tasks}
    for name in written:
        if _plain(name) not in spelled:
            raise UsageError(
                f"{option}: no result has a task `{name}`{did_you_mean(name, tasks)}",
                f"the tasks are {quoted(tasks, 30)}",
            )
    return tuple(dict.fromkeys(spelled[_plain(name)] for name in written))


def _plain(name: str) -> str:
    return name.strip().replace("_", "-").lower()


def ordered(rows: Sequence[Row], by: str | None, ascending: bool, tasks: Sequence[str]) -> list[Row]:
    """The rows sorted by `average` or a task, largest first unless `ascending`; or by `name`, from A to Z either way.
    Rows without that number come last, and equal ones stay in order.

    Raises:
        UsageError: there is nothing of that name to sort by.
    """
    if by is None:
        if ascending:
            raise UsageError("--ascending: needs `--sort`, which says by what")
        return list(rows)
    if by == "name":
        return sorted(rows, key=lambda row: row.name)
    if by not in ("average", *tasks):
        known = ("average", "name", *tasks)
        raise UsageError(f"--sort: expected one of {', '.join(known)}, got `{by}`{did_you_mean(by, known)}")
    sign = 1 if ascending else -1

    def key(row: Row) -> tuple[bool, float]:
        value = row.average if by == "average" else row.values.get(by)
        return value is None, sign * (value or 0.0)

    return sorted(rows, key=key)


def head_of(name: str, metric: Metric) -> Column:
    """A column of accuracies or of losses."""
    return (
        Column(name, "percent", better="higher")
        if metric == "accuracy"
        else Column(name, "number", better="lower")
    )


INTERVALS = (
    "±: the longer side of the 95 % interval. Of an accuracy: Wilson's score interval. Of an average of T tasks: square "
    "root of the sum of the tasks' squared sides, divided by T (variance of a mean of independent binomials; the tasks "
    "are taken as given)."
)


def scores(rows: Sequence[Row], tasks: Sequence[str], metric: Metric, intervals: bool) -> Block:
    """A column for each task, the average, and the averages of seen and unseen tasks where those are known."""
    head = partial(head_of, metric=metric)

    def task_cell(row: Row, task: str) -> Cell:
        value = row.values.get(task)
        if value is None or not intervals or row.result is None:
            return value
        return Estimate(value, *wilson(*row.counts([task])[0]))

    def mean_cell(row: Row, value: float | None, counted: Sequence[str]) -> Cell:
        if value is None or not intervals or row.result is None:
            return value
        return Estimate(value, *mean_interval(row.counts(counted)))

    columns = [(head(task), [task_cell(row, task) for row in rows]) for task in tasks]
    columns.append((head("average"), [mean_cell(row, row.average, list(row.values)) for row in rows]))
    notes = [INTERVALS] if intervals else []
    if any(row.seen for row in rows):
        for part in ("seen", "unseen"):
            cells = [mean_cell(row, row.mean(part), row.tasks(part)) for row in rows]
            columns.append((head(f"average ({part})"), cells))
        sets = {row.seen: row for row in rows if row.seen}
        if len(sets) == 1:
            notes.append(f"seen: {', '.join(next(iter(sets)))}.")
    return Block(columns, notes, list(_uneven(rows, tasks)))


def _uneven(rows: Sequence[Row], tasks: Sequence[str]) -> Iterable[str]:
    """A warning for each row that lacks a task, since its average is over other tasks."""
    for row in rows:
        lacking = [task for task in tasks if task not in row.values]
        if lacking and row.values:
            yield f"`{row.name}` lacks {quoted(lacking)}: its average is of other tasks than the others'"


def normalized(rows: Sequence[Row], tasks: Sequence[str], fine_tuned: Evaluation) -> Block:
    """Each accuracy divided by the fine-tuned models', and the mean of these ratios."""

    def ratio(row: Row, task: str) -> float | None:
        own = fine_tuned.tasks.get(task)
        return row.values[task] / own.accuracy if task in row.values and own and own.accuracy else None

    def mean(row: Row) -> float | None:
        ratios = [ratio(row, task) for task in row.values]
        known = [each for each in ratios if each is not None]
        return sum(known) / len(known) if ratios and len(known) == len(ratios) else None

    columns: list[tuple[Column, list[Cell]]] = [
        (Column(f"{task} (norm.)", "percent", better="higher"), [ratio(row, task) for row in rows])
        for task in tasks
    ]
    columns.append((Column("average (norm.)", "percent", better="higher"), [mean(row) for row in rows]))
    lacking = [task for task in tasks if task not in fine_tuned.tasks]
    return Block(
        columns,
        [f"(norm.): divided by the accuracy of `{fine_tuned.name}` on the same task; its average is the mean of these."],
        [f"`{fine_tuned.name}` lacks {quoted(lacking)}: not normalized"] if lacking else [],
    )  # fmt: skip


SAME: Mapping[str, Callable[[TaskScore], object]] = {
    "images": lambda score: (score.images, score.data.get("fingerprint")),
    "splits": lambda score: score.split,
    "corruptions": lambda score: (score.corruption, score.severity),
    "class names": lambda score: score.classes,
    "templates": lambda score: score.templates,
}
"""What must agree between two accuracies on a task if they are to be compared."""


def comparable(evaluations: Sequence[Evaluation]) -> list[str]:
    """A warning for each difference that makes results incomparable, and for each limit on what they mean."""
    lines: list[str] = []
    every = [score for each in evaluations for score in each.tasks.values()]
    if limits := sorted({score.limit for score in every if score.limit}):
        lines.append(f"at most {limits[-1]} images of each task were evaluated")
    if corrupted := sorted({f"{score.corruption} {score.severity}" for score in every if score.corruption}):
        lines.append(f"the images were corrupted: {quoted(corrupted)}")
    for what, part in SAME.items():
        differing = [
            task
            for task in tasks_of(evaluations)
            if len({part(each.tasks[task]) for each in evaluations if task in each.tasks}) > 1
        ]
        if differing:
            lines.append(f"the results are of different {what}: {quoted(differing)}")
    clips = [{each.clip.get(part) for each in evaluations} - {None} for part in _CLIP]
    if any(len(known) > 1 for known in clips):
        lines.append("the results are of different CLIPs")
    if len({each.clip.get("processing") for each in evaluations} - {None}) > 1:
        lines.append("the images were processed in different ways")
    if len({each.dtype for each in evaluations}) > 1:
        lines.append("the results were computed in different dtypes")
    lines += [
        f"`{each.name}` was learned on the same images that it is evaluated on, without labels: {quoted(own)}"
        for each in evaluations
        if (own := looked_at_itself(each))
    ]
    return lines


_CLIP = ("digest", "text", "rest")


def looked_at_itself(result: Evaluation) -> list[str]:
    """The tasks that are evaluated on the images that the method was learned on."""
    return [
        task
        for task, score in result.tasks.items()
        if (seen := result.looked_at.get(task))
        and (seen.get("split"), seen.get("data")) == (score.split, score.data.get("fingerprint"))
    ]


def about_towers(rows: Sequence[Row]) -> Block:
    """The size of each checkpoint relative to one tower, if one differs, and the routing of mixtures."""
    sizes = [row.result.relative_size if row.result else None for row in rows]
    routings = [row.result.checkpoint.get("routing") if row.result else None for row in rows]
    uneven = any(
        size is not None and f"{size:.2f}" != "1.00" and row.method != FINE_TUNED
        for size, row in zip(sizes, rows, strict=True)
    )
    columns: list[tuple[Column, list[Cell]]] = []
    notes: list[str] = []
    if uneven:
        columns.append((Column("size", "ratio"), list(sizes)))
        notes.append("size: bytes of the checkpoint, divided by those of the CLIP's own vision tower.")
    if any(routings):
        columns.append((Column("routing"), list(routings)))
        routings_explained = {
            "sample": "`sample`, each image by itself",
            "batch": "`batch`, the images of a batch as one, which are of one task, so that the task leaks",
            "task": "`task`, the task is given",
            "sim": "`sim`, the file finds the task of each image, and its class among those of the true task",
        }
        known = "; ".join(what for name, what in routings_explained.items() if name in routings)
        notes += [f"routing: {known}."] if known else []
    if heads := [row.name for row in rows if row.result and row.result.checkpoint.get("heads") == "learned"]:
        verb = "have" if len(heads) > 1 else "has"
        notes.append(f"{quoted(heads)} {verb} learned heads; those of the other rows are zero-shot heads.")
    quantized: dict[str, list[str]] = {}
    for row in rows:
        if row.result and (of := row.result.checkpoint.get("quantized")):
            quantized.setdefault(of, []).append(row.name)
    notes += [f"{quoted(names)}: made of {of}." for of, names in quantized.items()]
    found = [_task_found(row.result) if row.result else None for row in rows]
    if any(each is not None for each in found):
        columns.append((Column("task found", "percent", better="higher"), list(found)))
        notes.append("task found: images for which the file found the right task, averaged over the tasks.")
    return Block(columns, notes)


def _task_found(result: Evaluation) -> float | None:
    shares = [score.task_found for score in result.tasks.values() if score.task_found is not None]
    return sum(shares) / len(shares) if shares else None


def about_images(rows: Sequence[Row]) -> Block:
    """Split and corruption of each row, if rows differ in them."""
    shown = [_images(row) for row in rows]
    if len(set(shown) - {None}) < 2:
        return Block()
    return Block([(Column("images"), list(shown))])


def _images(row: Row) -> str | None:
    """Splits and corruptions, such as `test, contrast 5`; None for a published row."""
    if row.result is None:
        return None
    parts = [
        each.split + (f", {each.corruption} {each.severity}" if each.corruption else "")
        for each in row.result.tasks.values()
    ]
    return "; ".join(dict.fromkeys(parts))
