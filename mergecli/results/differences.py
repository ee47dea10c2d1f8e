"""Differences to one model, and whether they are significant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergecli.results.cells import Cell, Column, Estimate, Shows
from mergecli.results.result import FINE_TUNED, Evaluation, TaskScore, read_result
from mergecli.results.rows import SAME, Block, Row
from mergecli.results.statistics import (
    Count,
    Interval,
    Pair,
    difference_interval,
    holm,
    paired_bootstrap,
    permutation,
)
from mergecli.runtime.errors import InputError, UsageError, did_you_mean, quoted

if TYPE_CHECKING:
    from numpy import ndarray

    Vector = ndarray[Any, Any]

COLUMNS = ("checkpoint", "task", "index", "label", "prediction")
SIGNIFICANCE = 0.05


class Answers(NamedTuple):
    """One model's answers on one task, in the order of the images."""

    images: Vector
    labels: Vector
    right: Vector


Predictions = Mapping[tuple[str, str], Answers]
"""(model, task) -> answers."""


def baseline(wanted: str | Path, evaluations: Sequence[Evaluation]) -> Evaluation:
    """The result with that name, or in that file.

    Raises:
        UsageError: there is no such result. InputError: the file is not a result.
    """
    named = [each for each in evaluations if each.name == str(wanted)]
    if len(named) == 1:
        return named[0]
    if named:
        raise UsageError(f"--against: {len(named)} results are called `{wanted}`", "name the file of one")
    if Path(wanted).suffix == ".json":
        return read_result(wanted)
    names = [each.name for each in evaluations]
    raise UsageError(
        f"--against: no result is called `{wanted}`{did_you_mean(str(wanted), names)}",
        f"name one of {quoted(names)}, or the JSON file of another",
    )


def read_predictions(files: Sequence[str | Path]) -> Predictions:
    """The predictions that `evaluate` wrote, from all files together.

    Raises:
        InputError: a file is missing or of another kind, or two have the same model and task.
    """
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    found: dict[tuple[str, str], Answers] = {}
    for file in map(Path, files):
        if not file.is_file():
            raise InputError(f"{file}: no such predictions")
        try:
            columns = parquet.read_table(file, columns=list(COLUMNS))
            names = [columns[name].to_numpy() for name in COLUMNS[:2]]
            numbers = [columns[name].to_numpy().astype(np.int64) for name in COLUMNS[2:]]
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{file}: is not a table of predictions", _HINT) from error
        if any(len(columns[name]) and not isinstance(columns[name][0].as_py(), str) for name in COLUMNS[:2]):
            raise InputError(f"{file}: is not a table of predictions", _HINT)
        models, model = np.unique(names[0].astype(str), return_inverse=True)
        tasks, task = np.unique(names[1].astype(str), return_inverse=True)
        for pair in np.unique(model * len(tasks) + task):
            key = (str(models[pair // len(tasks)]), str(tasks[pair % len(tasks)]))
            if key in found:
                raise InputError(f"{file}: `{key[0]}` on `{key[1]}` is in another file too")
            index, label, prediction = (each[model * len(tasks) + task == pair] for each in numbers)
            order = np.argsort(index, kind="stable")
            if (np.diff(index[order]) == 0).any():
                raise InputError(f"{file}: `{key[0]}` on `{key[1]}`: an image is there twice")
            found[key] = Answers(index[order], label[order], (label == prediction)[order])
    return found


_HINT = "expected a Parquet file that `mergecli eval --predictions` wrote"


class _Unpaired(NamedTuple):
    """Why two models cannot be compared image by image on a task."""

    task: str
    why: str
    """Goes before the task's name."""
    hint: str = ""


class _Difference(NamedTuple):
    """A number compared with the baseline's."""

    value: float
    interval: Interval
    p: float | None = None
    """None where the models could not be compared image by image."""


def columns(
    rows: Sequence[Row],
    tasks: Sequence[str],
    against: Evaluation,
    predictions: Predictions | None,
    *,
    p_values: bool = False,
    intervals: bool = False,
) -> Block:
    """For each task and the average: accuracy minus that of `against`, its interval, and its test where both have
    predictions of the same images.

    Raises:
        InputError: there are predictions, but not of a single pair; or they do not give a result's counts.
    """
    untested: list[_Unpaired] = []
    found = [_differences(row, tasks, against, predictions, untested) for row in rows]
    every = [each for row in found for each in row if each]
    tested = any(each.p is not None for each in every)
    if untested and not tested:
        first = untested[0]
        raise InputError(f"predictions: {first.why} `{first.task}`", first.hint)
    shows: Shows = "interval" if intervals else "number" if p_values else "test"
    shown: list[tuple[Column, list[Cell]]] = []
    for place, head in enumerate([*tasks, "average"]):
        cells, corrected = _cells([row[place] for row in found], shows)
        shown.append((Column(f"{head} (diff.)", "points"), cells))
        if p_values:
            shown.append((Column(f"{head} (p)", "probability"), corrected))
    uneven = [row.name for row in rows if row.result and set(row.values) != set(against.tasks)]
    warnings = [f"{quoted(uneven)}: the average difference is over the tasks shared with `{against.name}`"]
    others = [row.result for row in rows if row.result]
    differing = [t for t in tasks if t in against.tasks and any(_other(each, against, t) for each in others)]
    if differing:
        warnings.append(f"not on the same images as `{against.name}`: {quoted(differing)}")
    for why in dict.fromkeys(each.why for each in untested):
        on = dict.fromkeys(each.task for each in untested if each.why == why)
        warnings.append(f"predictions: {why} {quoted(on)}: compared unpaired")
    notes = [_DIFFERENCE.format(name=against.name)]
    if tested:
        verdict = _TESTED + _MARK * (shows == "test") + _P * p_values
        notes = [f"{notes[0]} {verdict}", _BOOTSTRAP]
    if any(each.p is None for each in every):
        notes.append(_UNPAIRED)
    return Block(shown, notes, warnings[not uneven :])


def _cells(column: Sequence[_Difference | None], shows: Shows) -> tuple[list[Cell], list[Cell]]:
    """The differences of a column, and their p-values, corrected for being several."""
    tested = {row: each.p for row, each in enumerate(column) if each and each.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    cells: list[Cell] = []
    for row, each in enumerate(column):
        if each is None:
            cells.append(None)
        elif row in corrected:
            cells.append(Estimate(each.value, *each.interval, corrected[row] < SIGNIFICANCE, shows))
        else:
            low, high = each.interval
            cells.append(Estimate(each.value, low, high, not low <= 0 <= high))
    return cells, [corrected.get(row) for row in range(len(column))]


_DIFFERENCE = "(diff.): accuracy minus that of `{name}`, in points."
_TESTED = (
    "Where there are predictions of both, they are compared image by image: by McNemar's exact test for a task, by its "
    "permutation test for the average (100,000 draws, seed 0), Holm-corrected for the number of rows."
)
_MARK = " n.s.: not significant, p >= 0.05."
_P = " (p): the corrected p-value."
_BOOTSTRAP = (
    "The 95 % interval of a tested difference, which `--intervals` shows, is a paired bootstrap's (10,000 resamples of the "
    "images within each task, seed 0)."
)
_UNPAIRED = (
    "±: longer side of the 95 % interval of a difference that is not tested, for two independent proportions (Newcombe), "
    "unpaired: as if they had been evaluated on different images, and so too wide for the same ones; `--predictions` makes "
    "it paired. Not corrected for making many comparisons."
)


def _differences(
    row: Row,
    tasks: Sequence[str],
    against: Evaluation,
    predictions: Predictions | None,
    untested: list[_Unpaired],
) -> list[_Difference | None]:
    """One for each task, then that of the average; adds to `untested` what could not be paired."""
    shared = [task for task in tasks if task in row.values and task in against.tasks]
    if row.result is None or row.result is against or row.result == against or not shared:
        return [None] * (len(tasks) + 1)
    result = row.result
    gaps = {task: result.tasks[task].accuracy - against.tasks[task].accuracy for task in shared}
    pairs: dict[str, Pair] = {}
    for task in shared if predictions is not None else ():
        pair = _pair(task, result, against, predictions or {})
        if isinstance(pair, Pair):
            pairs[task] = pair
        else:
            untested.append(pair)

    def compared(value: float, over: Sequence[str]) -> _Difference:
        if all(task in pairs for task in over):
            both = [pairs[task] for task in over]
            return _Difference(value, paired_bootstrap(both), permutation(both))
        counts = [(_count(result.tasks[task]), _count(against.tasks[task])) for task in over]
        return _Difference(value, difference_interval([a for a, _ in counts], [b for _, b in counts]))

    cells = [compared(gaps[task], [task]) if task in gaps else None for task in tasks]
    return [*cells, compared(sum(gaps.values()) / len(gaps), shared)]


def _count(score: TaskScore) -> Count:
    return Count(score.correct, score.images)


def _other(result: Evaluation, against: Evaluation, task: str) -> bool:
    """Whether the two were evaluated on different images of the task."""
    if task not in result.tasks:
        return False
    ours, theirs = result.tasks[task], against.tasks[task]
    return any(SAME[part](ours) != SAME[part](theirs) for part in ("images", "splits", "corruptions"))


def _pair(task: str, first: Evaluation, second: Evaluation, predictions: Predictions) -> Pair | _Unpaired:
    """The disagreements of two models on the same images of a task, or why they are not known.

    Raises:
        InputError: predictions do not give the counts of their result.
    """
    ours, theirs = (_answers(each, task, predictions) for each in (first, second))
    if ours is None or theirs is None:
        known = dict.fromkeys(model for model, _ in predictions)
        hint = f"the files have {quoted(known)}" if known else "the files are empty"
        return _Unpaired(task, f"there are none of `{(first if ours is None else second).name}` on", hint)
    if (
        _other(first, second, task)
        or ours.images.tolist() != theirs.images.tolist()
        or ours.labels.tolist() != theirs.labels.tolist()
    ):
        return _Unpaired(task, f"`{first.name}` and `{second.name}` were not evaluated on the same images of")
    return Pair(
        int((ours.right & ~theirs.right).sum()), int((theirs.right & ~ours.right).sum()), len(ours.images)
    )


def _answers(result: Evaluation, task: str, predictions: Predictions) -> Answers | None:
    """The predictions of a result, after a check that they give its counts; None if there are none. Fine-tuned models
    are named after their tasks."""
    found = predictions.get((result.name, task))
    if found is None and result.name == FINE_TUNED:
        found = predictions.get((task, task))
    if found is None:
        return None
    score = result.tasks[task]
    got = (int(found.right.sum()), len(found.images))
    if got != (score.correct, score.images):
        raise InputError(
            f"predictions: `{result.name}` on `{task}`: {got[0]:,} of {got[1]:,} images are right, "
            f"but the result says {score.correct:,} of {score.images:,}"
        )
    return found
