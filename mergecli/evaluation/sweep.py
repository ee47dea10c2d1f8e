"""`sweep`: one merge for each value of some settings, each evaluated and then deleted, and the best of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from mergecli.evaluation.evaluate import evaluate, forget, tasks_of
from mergecli.hub.fetched import expect_all
from mergecli.merging.sweep_points import Point, merge_batch, point_files, points_of
from mergecli.results.cells import Cell, Column
from mergecli.results.plan import Plan, Work, check, plan
from mergecli.results.result import Evaluation
from mergecli.results.statistics import Count, difference_interval
from mergecli.results.tables import Table
from mergecli.runtime.dry_run import work_begins
from mergecli.runtime.errors import UsageError, toml_text
from mergecli.runtime.progress import AnyProgress, shown
from mergecli.storage.atomic import check_target, check_targets, warn_of_others, write_text
from mergecli.storage.store import locate

ROOM = 4 << 30
"""Bytes of checkpoints that are in the temporary folder at a time. Each such batch costs one pass over the models."""


@dataclass(frozen=True)
class Swept:
    """What a sweep found."""

    points: tuple[Point, ...]
    results: tuple[Evaluation, ...]
    """One a point."""
    best: int
    """Which point has the highest average accuracy; of several the first."""
    chosen_on: str
    """The split whose images the best point was chosen on."""
    confirmed: Evaluation | None
    """The best point on the tasks' own split, if it was chosen on another."""

    @property
    def table(self) -> Table:
        """A row a point: the swept settings, each task, the average, and a mark for the best."""
        keys = list(self.points[0].values)
        tasks = list(self.results[0].tasks)
        columns = [Column(key) for key in keys] + [Column(task, "percent") for task in [*tasks, "average"]]
        rows: list[tuple[Cell, ...]] = []
        near = self.near
        for number, (point, result) in enumerate(zip(self.points, self.results, strict=True)):
            values = [
                each if isinstance(each, int | float | str) else toml_text(each)
                for each in point.values.values()
            ]
            scores = [result.tasks[task].accuracy for task in tasks]
            mark = "best" if number == self.best else "n.s." if number in near else ""
            rows.append((*values, *scores, result.average.accuracy, mark))
        return Table((*columns, Column(f"on {self.chosen_on}")), tuple(rows), notes=(self.note,))

    @property
    def near(self) -> list[int]:
        """Points whose average does not differ significantly from the best one's: the 95 % interval of the difference, as if
        they had seen different images, contains 0."""
        best = _counts(self.results[self.best])
        intervals = [difference_interval(best, _counts(each)) for each in self.results]
        return [
            number
            for number, each in enumerate(intervals)
            if number != self.best and each.low <= 0 <= each.high
        ]

    @property
    def note(self) -> str:
        """What may be concluded of the best point."""
        best, confirmed = self.results[self.best], self.confirmed
        text = f"{self.points[self.best].name} is the best on {self.chosen_on}"
        reported = confirmed or best
        if confirmed is not None:
            text += f"; on the tasks' own split it has {100 * confirmed.average.accuracy:.1f} %"
        else:
            text += f" with {100 * best.average.accuracy:.1f} %"
        if any(reported.tasks[task].split == best.tasks[task].split for task in best.tasks):
            text += (
                ", chosen on the images that it is reported on; choose on others with `--select validation`"
            )
        if self.near:
            text += f". n.s.: chance alone may put it before these {len(self.near)}"
        return text


def sweep(
    recipe: str | Path,
    over: Sequence[str],
    *,
    method: str | None = None,
    changes: Sequence[str] = (),
    select: str | None = None,
    keep: str | Path | None = None,
    output: str | Path | None = None,
    plot: str | Path | None = None,
    device: str = "cpu",
    progress: AnyProgress | None = None,
    **evaluation: Any,
) -> Swept:
    """Merges the recipe's models once for each value of some settings, and evaluates each merge.

    All points share the passes over the models, the decoded images and the heads. Checkpoints are in a temporary folder
    until they are evaluated. To resume an interrupted sweep, make the same call again: it merges again, and evaluates
    only what was left.

    Args:
        over: `method.SETTING=FIRST:LAST:STEP` or `method.SETTING=VALUE,VALUE,...`; several make a grid.
        select: a split such as `validation`, on which the best point is chosen. That point is then evaluated on the tasks'
            own split.
        keep: a folder that gets the checkpoints.
        output: a folder that gets one result for each point, and `best.json`.
        plot: a file (PNG, SVG or PDF) that gets curves over the setting that has most values, all of them numbers.
        evaluation: further arguments of `evaluate`, such as `tasks`, `limit` or `dtype`.
    """
    points = points_of(recipe, over, method=method, changes=changes)
    axis = _axis(points) if plot else None
    target = Path(output) if output is not None else None
    if target and target.suffix:
        raise UsageError(
            f"{target}: a sweep has several results, so the output is a folder",
            f"write `-o {target.with_suffix('')}/`",
        )
    targets = (
        [target / f"{name}.json" for name in [*(point.name for point in points), "best"]] if target else []
    )
    if plot:
        from mergecli.results.plots import require_matplotlib

        require_matplotlib(Path(plot))
    check_targets([(each, ()) for each in [*targets, *([Path(plot)] if plot else [])]], {})
    if target:
        warn_of_others(target, {each.name for each in targets})
    known = points[0].recipe
    tasks = tasks_of(evaluation.get("tasks"), known)
    expect_all([known.base, *known.tuned.values()], known, tasks)
    kept = Path(keep) if keep is not None else None
    if kept:
        check_target(kept, folder=True)
        warn_of_others(kept, {path.name for path in point_files(points, kept)})
    split = evaluation.pop("split", None)
    shared: dict[str, Any] = {**evaluation, "device": device, "progress": progress}
    # no merge is there yet: the base stands for all, which routes no batches
    base = partial(evaluate, recipe=known, only=["base"], **shared)
    if shared.get("routing") == "batch":
        base = partial(base, routing="sample")
    for each in dict.fromkeys((select or split, split)):
        check(base, split=each)
    confirm = partial(base, split=split) if select else None
    work_begins(partial(_plan, points, kept, targets, device, partial(base, split=select or split), confirm))
    results: list[Evaluation] = []
    unfinished: list[Path] = []
    shared["unfinished"] = unfinished
    scratch = TemporaryDirectory(prefix="mergecli-sweep-", ignore_cleanup_errors=True)
    with scratch as temporary, shown(progress) as report:
        shared["progress"] = report
        folder = Path(temporary)
        for following, batch in _batches(points, kept):
            files = {
                each.path.stem: each.path
                for each in merge_batch(batch, kept or folder, device=device, progress=report)
            }
            found = evaluate(files, recipe=points[0].recipe, split=select or split, **shared)
            results += [_labeled(result, point) for result, point in zip(found, batch, strict=True)]
            if not kept and following:  # `select` may need the last batch again
                for file in files.values():
                    file.unlink()
        best = max(range(len(points)), key=lambda number: results[number].average.accuracy)
        confirmed = None
        if select is not None:
            path = (kept or folder) / f"{points[best].name}.safetensors"
            if not path.exists():
                merge_batch([points[best]], folder, device=device)
            (own,) = evaluate({points[best].name: path}, recipe=points[0].recipe, split=split, **shared)
            confirmed = _labeled(own, points[best])
    splits = {score.split for score in results[0].tasks.values()}
    swept = Swept(points, tuple(results), best, select or " and ".join(sorted(splits)), confirmed)
    chosen = confirmed or results[best]
    chosen = replace(chosen, checkpoint={**chosen.checkpoint, "selected_on": swept.chosen_on})
    for path, result in zip(targets, [*results, chosen], strict=False):
        write_text(path, result.to_json())
    if plot and axis:
        _draw(swept, axis, Path(plot))
    forget(unfinished)
    return swept


def _plan(
    points: Sequence[Point],
    kept: Path | None,
    outputs: Sequence[Path],
    device: str,
    base: Callable[[], object],
    confirm: Callable[[], object] | None,
) -> Plan:
    """The plan of a sweep, from those of its first merges and of an evaluation of the base in place of a merge.

    Args:
        confirm: evaluates the base on the tasks' own split, where the best point is chosen on another.
    """
    began = time.perf_counter()
    batches = [batch for _, batch in _batches(points, kept)]
    merges = plan(merge_batch, batches[0], kept or Path(gettempdir()) / "mergecli-sweep", device=device)
    evaluation, confirmation = plan(base), plan(confirm) if confirm else None
    work: list[Work] = []
    for each in merges.work:
        share = len(points) / len(batches[0])
        if each.work == "write" and kept is None:
            each = replace(each, file="a temporary folder")
        if each.work in ("read", "merge"):
            each = replace(
                each, passes=(each.passes or 0) * len(batches), seconds=(each.seconds or 0.0) * share
            )
        if each.work != "check":
            work.append(each)
    count = len(points)
    for each in evaluation.work:
        if each.work == "evaluate":
            what = each.what.replace("base", f"{count} merges", 1)
            seconds = count * (each.seconds or 0.0)
            each = replace(each, what=what, images=count * (each.images or 0), cached=None, seconds=seconds)
        if each.work in ("head", "decode", "evaluate"):
            work.append(each)
    for each in confirmation.work if confirmation else ():
        if each.work in ("head", "decode", "evaluate"):
            what = each.what.replace("base", "the best merge", 1) if each.work == "evaluate" else each.what
            work.append(replace(each, what=what))
    work += [Work("write", "results", str(path)) for path in outputs]
    memory = max(each.memory for each in (merges, evaluation, confirmation) if each)
    return Plan("eval", tuple(work), memory, time.perf_counter() - began)


def _batches(points: Sequence[Point], kept: Path | None) -> Iterator[tuple[int, Sequence[Point]]]:
    """(batches that follow, points whose checkpoints fit into `ROOM` together)."""
    first = points[0].recipe
    source = first.base or next(iter(first.tuned.values()))
    path = locate(source)
    size = sum(file.stat().st_size for file in (path.glob("*.safetensors") if path.is_dir() else [path]))
    share = len(points) if kept else max(1, ROOM // max(size, 1))
    starts = range(0, len(points), share)
    for number, start in enumerate(starts):
        yield len(starts) - number - 1, points[start : start + share]


def _counts(result: Evaluation) -> list[Count]:
    return [Count(each.correct, each.images) for each in result.tasks.values()]


def _labeled(result: Evaluation, point: Point) -> Evaluation:
    """The result with the values of the swept settings in it."""
    values = {key: _plain(each) for key, each in point.values.items()}
    about: Mapping[str, str | None] = {**result.checkpoint, "path": point.name, **values}
    return replace(result, checkpoint=about)


def _axis(points: Sequence[Point]) -> str:
    """The swept setting on the x axis: of those whose values are all numbers, the one with most values."""
    values = {key: {point.values[key] for point in points} for key in points[0].values}
    known = [key for key, each in values.items() if all(isinstance(value, int | float) for value in each)]
    if not known:
        raise UsageError("a curve needs a swept setting whose values are numbers", "leave `--plot` out")
    return max(known, key=lambda key: len(values[key]))


def _draw(swept: Swept, key: str, path: Path) -> None:
    """Curves of every task and of the average; where other settings were swept too, of the average for each of their values."""
    from mergecli.results.plots import curves, save

    x = sorted({float(point.values[key]) for point in swept.points})
    best = x.index(float(swept.points[swept.best].values[key]))
    lines: dict[str, list[float | None]] = {}
    for point, result in zip(swept.points, swept.results, strict=True):
        scores = (
            {task: score.accuracy for task, score in result.tasks.items()} if len(point.values) == 1 else {}
        )
        for line, accuracy in {**scores, _others(point, key): result.average.accuracy}.items():
            lines.setdefault(line, [None] * len(x))[x.index(float(point.values[key]))] = 100 * accuracy
    bold = _others(swept.points[swept.best], key)
    figure = curves(
        x, {name: values for name, values in lines.items() if name != bold}, lines[bold], bold=bold,
        x_label=f"{swept.points[0].recipe.method}: {key.removeprefix('method.')}", best=best,
        y_label="accuracy (%)" if bold == "average" else "average accuracy (%)", best_label=f"best on {swept.chosen_on}",
    )  # fmt: skip
    save(figure, path)


def _others(point: Point, key: str) -> str:
    """The label of a curve along `key`: the values of the other settings, or `average` where there are none."""
    others = {each: value for each, value in point.values.items() if each != key}
    return (
        ", ".join(f"{each.removeprefix('method.')} {_plain(value)}" for each, value in others.items())
        or "average"
    )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else toml_text(value)
