"""`sweep`: a merge for each value of some settings, evaluated without keeping the checkpoints, and the best of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergecli.errors import UsageError, shown
from mergecli.evaluation import evaluate
from mergecli.output import check_targets, write_text
from mergecli.progress import Progress
from mergecli.scores import Evaluation
from mergecli.sources import locate
from mergecli.sweeping import Point, merge_sweep, points_of
from mergecli.tables import Cell, Column, Table

ROOM = 4 << 30
"""Bytes of checkpoints that lie in the temporary folder at a time; each round of them costs one pass over the models."""


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
        for number, (point, result) in enumerate(zip(self.points, self.results, strict=True)):
            values = [
                each if isinstance(each, int | float | str) else shown(each) for each in point.values.values()
            ]
            scores = [result.tasks[task].accuracy for task in tasks]
            rows.append((*values, *scores, result.average.accuracy, "best" if number == self.best else ""))
        return Table((*columns, Column(f"on {self.chosen_on}")), tuple(rows), notes=(self.note,))

    @property
    def note(self) -> str:
        """What may be concluded of the best point."""
        name, result = self.points[self.best].name, self.results[self.best]
        if self.confirmed is not None:
            own = self.confirmed.average.accuracy
            return f"{name} is the best on {self.chosen_on}; on the tasks' own split it has {100 * own:.1f} %"
        return (
            f"{name} is the best with {100 * result.average.accuracy:.1f} %, chosen on the images that it is reported "
            "on; choose on others with `--select validation`"
        )


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
    progress: Progress | None = None,
    **evaluation: Any,
) -> Swept:
    """Merges the recipe's models once for each value of some settings, and evaluates each merge.

    Passes over the models, decoded images and heads are shared by all points. Checkpoints lie in a temporary folder
    until they are evaluated.

    Args:
        over: `method.SETTING=FIRST:LAST:STEP` or `method.SETTING=VALUE,VALUE,...`; several make a grid.
        select: a split such as `validation` to choose the best point on; that point is then evaluated on the tasks' own.
        keep: a folder that gets the checkpoints.
        output: a folder that gets a result a point, and `best.json`.
        plot: a curve (PNG, SVG or PDF) over one setting whose values are numbers.
        evaluation: further arguments of `evaluate`, such as `tasks`, `limit` or `dtype`.
    """
    points = points_of(recipe, over, method=method, changes=changes)
    axis = _axis(points) if plot else None
    target = Path(output) if output is not None else None
    if target and target.suffix:
        raise UsageError(f"{target}: a sweep has several results, so the output is a folder")
    targets = (
        [target / f"{name}.json" for name in [*(point.name for point in points), "best"]] if target else []
    )
    if plot:
        from mergecli.plots import require_matplotlib

        require_matplotlib(Path(plot))
    check_targets([(each, ()) for each in [*targets, *([Path(plot)] if plot else [])]], {})
    kept = Path(keep) if keep is not None else None
    split = evaluation.pop("split", None)
    shared: dict[str, Any] = {**evaluation, "device": device, "progress": progress}
    results: list[Evaluation] = []
    with _scratch() as folder:
        for number, round_ in _rounds(points, kept):
            files = {
                each.path.stem: each.path
                for each in merge_sweep(round_, kept or folder, device=device, progress=progress)
            }
            found = evaluate(files, recipe=points[0].recipe, split=select or split, **shared)
            results += [_labelled(result, point) for result, point in zip(found, round_, strict=True)]
            if not kept and number:
                for file in files.values():
                    file.unlink()
        best = max(range(len(points)), key=lambda place: results[place].average.accuracy)
        confirmed = None
        if select is not None:
            path = (kept or folder) / f"{points[best].name}.safetensors"
            if not path.exists():
                merge_sweep([points[best]], folder, device=device)
            (own,) = evaluate({points[best].name: path}, recipe=points[0].recipe, split=split, **shared)
            confirmed = _labelled(own, points[best])
    splits = {score.split for score in results[0].tasks.values()}
    swept = Swept(points, tuple(results), best, select or " and ".join(sorted(splits)), confirmed)
    for path, result in zip(targets, [*results, confirmed or results[best]], strict=False):
        write_text(path, result.to_json())
    if plot and axis:
        _draw(swept, axis, Path(plot))
    return swept


class _scratch:  # noqa: N801  used as a function is
    """A temporary folder that vanishes however the block ends."""

    def __enter__(self) -> Path:
        self._folder = Path(tempfile.mkdtemp(prefix="mergecli-sweep-"))
        return self._folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _rounds(points: Sequence[Point], kept: Path | None) -> Iterator[tuple[int, Sequence[Point]]]:
    """(rounds still to come, points whose checkpoints there is room for at a time)."""
    first = points[0].recipe
    source = first.base or next(iter(first.tuned.values()))
    path = locate(source)
    size = sum(file.stat().st_size for file in (path.glob("*.safetensors") if path.is_dir() else [path]))
    share = len(points) if kept else max(1, ROOM // max(size, 1))
    starts = range(0, len(points), share)
    for number, start in enumerate(starts):
        yield len(starts) - number - 1, points[start : start + share]


def _labelled(result: Evaluation, point: Point) -> Evaluation:
    """The result, which says the values of the swept settings."""
    values = {key: each if isinstance(each, str) else shown(each) for key, each in point.values.items()}
    about: Mapping[str, str | None] = {**result.checkpoint, "path": point.name, **values}
    return replace(result, checkpoint=about)


def _axis(points: Sequence[Point]) -> str:
    """The one swept setting, whose values are numbers: a curve has one axis."""
    (key, *more) = points[0].values
    if more or not all(isinstance(point.values[key], int | float) for point in points):
        raise UsageError(
            "a curve has one axis: sweep one setting whose values are numbers, or leave `--plot` out"
        )
    return key


def _draw(swept: Swept, key: str, path: Path) -> None:
    from mergecli.plots import curves, save

    tasks = {
        task: [100 * each.tasks[task].accuracy for each in swept.results] for task in swept.results[0].tasks
    }
    figure = curves(
        [float(point.values[key]) for point in swept.points], tasks,
        [100 * each.average.accuracy for each in swept.results],
        x_label=f"{swept.points[0].recipe.method}: {key.removeprefix('method.')}", best=swept.best,
        best_label=f"best on {swept.chosen_on}",
    )  # fmt: skip
    save(figure, path)
