"""Differences to one model, and whether they are significant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergecli.results.cells import Cell, Column, Estimate
from mergecli.results.result import FINE_TUNED, Evaluation, TaskScore, read_result
from mergecli.results.rows import SAME, Block, Row
from mergecli.results.statistics import Count, Pair, difference_interval, mcnemar, paired_bootstrap
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


def columns(
    rows: Sequence[Row], tasks: Sequence[str], against: Evaluation, predictions: Predictions | None
) -> Block:
    """For each task and the average: accuracy minus that of `against`, its interval and significance."""
    cells = [_differences(row, tasks, against, predictions) for row in rows]
    heads = [*tasks, "average"]
    found = [
        (Column(f"{head} (diff.)", "points"), [row[number] for row in cells])
        for number, head in enumerate(heads)
    ]
    uneven = [row.name for row in rows if row.result and set(row.values) != set(against.tasks)]
    warnings = [f"{quoted(uneven)}: the average difference is over the tasks shared with `{against.name}`"]
    others = [row.result for row in rows if row.result]
    differing = [t for t in tasks if t in against.tasks and any(_other(each, against, t) for each in others)]
    if differing:
        warnings.append(f"not on the same images as `{against.name}`: {quoted(differing)}")
    note = _PAIRED if predictions is not None else _UNPAIRED
    return Block(found, [note.format(name=against.name)], warnings[not uneven :])


_PAIRED = (
    "(diff.): accuracy minus that of `{name}` on the same images, in points. ±: longer side of the 95 % interval, by a "
    "paired bootstrap (10,000 resamples of the images within each task, seed 0). n.s.: not significant: for "
    "a task, p >= 0.05 in McNemar's exact test; for the average, the interval holds 0. Not corrected for making many "
    "comparisons."
)
_UNPAIRED = (
    "(diff.): accuracy minus that of `{name}`, in points. ±: longer side of the 95 % interval for two independent "
    "proportions (Newcombe), unpaired: as if they had been evaluated on different images, and so too wide for the same "
    "ones; `--predictions` makes it paired. n.s.: not significant, the interval holds 0. Not corrected for "
    "making many comparisons."
)


def _differences(
    row: Row, tasks: Sequence[str], against: Evaluation, predictions: Predictions | None
) -> list[Cell]:
    """A cell for each task, then the average."""
    shared = [task for task in tasks if task in row.values and task in against.tasks]
    if row.result is None or row.result is against or row.result == against or not shared:
        return [None] * (len(tasks) + 1)
    result = row.result
    gaps = {task: result.tasks[task].accuracy - against.tasks[task].accuracy for task in shared}
    mean = sum(gaps.values()) / len(gaps)
    if predictions is None:
        counts = {t: (_count(result.tasks[t]), _count(against.tasks[t])) for t in shared}
        alone = {t: difference_interval([a], [b]) for t, (a, b) in counts.items()}
        whole = difference_interval([a for a, _ in counts.values()], [b for _, b in counts.values()])
        marks = {task: not low <= 0 <= high for task, (low, high) in alone.items()}
    else:
        pairs = {task: _pair(task, result, against, predictions) for task in shared}
        alone = {task: paired_bootstrap([pair]) for task, pair in pairs.items()}
        whole = paired_bootstrap(list(pairs.values()))
        marks = {
            task: mcnemar(pair.first_only, pair.second_only) < SIGNIFICANCE for task, pair in pairs.items()
        }
    cells = [Estimate(gaps[task], *alone[task], marks[task]) if task in gaps else None for task in tasks]
    return [*cells, Estimate(mean, *whole, not whole.low <= 0 <= whole.high)]


def _count(score: TaskScore) -> Count:
    return Count(score.correct, score.images)


def _other(result: Evaluation, against: Evaluation, task: str) -> bool:
    """Whether the two were evaluated on different images of the task."""
    if task not in result.tasks:
        return False
    ours, theirs = result.tasks[task], against.tasks[task]
    return any(SAME[part](ours) != SAME[part](theirs) for part in ("images", "splits", "corruptions"))


def _pair(task: str, first: Evaluation, second: Evaluation, predictions: Predictions) -> Pair:
    """The disagreements of two models on the same images of a task.

    Raises:
        InputError: the predictions lack one of them, or are of different images.
    """
    ours, theirs = (_answers(each, task, predictions) for each in (first, second))
    if (
        _other(first, second, task)
        or ours.images.tolist() != theirs.images.tolist()
        or ours.labels.tolist() != theirs.labels.tolist()
    ):
        raise InputError(
            f"predictions: `{first.name}` and `{second.name}` were not evaluated on the same images of `{task}`"
        )
    return Pair(
        int((ours.right & ~theirs.right).sum()), int((theirs.right & ~ours.right).sum()), len(ours.images)
    )


def _answers(result: Evaluation, task: str, predictions: Predictions) -> Answers:
    """The predictions of a result, after a check that they give its counts. Fine-tuned models are named after their tasks."""
    found = predictions.get((result.name, task))
    if found is None and result.name == FINE_TUNED:
        found = predictions.get((task, task))
    if found is None:
        known = dict.fromkeys(model for model, _ in predictions)
        raise InputError(
            f"predictions: there are none of `{result.name}` on `{task}`",
            f"the files have {quoted(known)}" if known else "the files are empty",
        )
    score = result.tasks[task]
    got = (int(found.right.sum()), len(found.images))
    if got != (score.correct, score.images):
        raise InputError(
            f"predictions: `{result.name}` on `{task}`: {got[0]:,} of {got[1]:,} images are right, "
            f"but the result says {score.correct:,} of {score.images:,}"
        )
    return found
