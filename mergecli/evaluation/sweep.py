"""`sweep`: one merge for each value of some settings, each evaluated and then deleted, and the best of them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, Any

from mergecli.evaluation.evaluate import evaluate
from mergecli.evaluation.grid import Grid, check_share, fill
from mergecli.evaluation.scoring import Scoring, evaluation_of, tell
from mergecli.evaluation.settings import Tower, read_arguments
from mergecli.evaluation.work import CountingWork
from mergecli.hub.fetched import expect_all
from mergecli.merging.merge import learning_key
from mergecli.merging.sweep_points import Identities, Point, identities, merge_batch, point_files, points_of
from mergecli.methods._base import DataDriven
from mergecli.methods._calibrated import measured_by
from mergecli.results.cells import Cell, Column
from mergecli.results.plan import Plan, Work, check, plan
from mergecli.results.result import Evaluation
from mergecli.results.statistics import Count, difference_interval
from mergecli.results.tables import Table
from mergecli.runtime.dry_run import work_begins
from mergecli.runtime.engines.contract import Engine, Unit
from mergecli.runtime.engines.grid import FailedUnitsError, Failure, workers_stay
from mergecli.runtime.engines.worker import node
from mergecli.runtime.errors import InputError, UsageError, quoted, toml_text
from mergecli.runtime.progress import AnyProgress, Progress, shown
from mergecli.storage.alone import alone
from mergecli.storage.atomic import check_target, check_targets, warn_of_others, write_text
from mergecli.storage.checkpoint import open_checkpoint
from mergecli.storage.metadata import inputs_of
from mergecli.storage.sources import Source
from mergecli.storage.store import locate
from mergecli.storage.units import LOG, UnitFiles

if TYPE_CHECKING:
    from mergecli.data.tasks import Task

ROOM = 4 << 30
"""Bytes of checkpoints that are in the temporary folder at a time. Each such batch costs one pass over the models."""
WINDOW = 8
"""Points that an engine works on at a time: so many merges are on a machine."""


@dataclass(frozen=True)
class Swept:
    """What a sweep found."""

    points: tuple[Point, ...]
    results: tuple[Evaluation, ...]
    """One a point; none where only a part of the units was done."""
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
        best = counts_of(self.results[self.best])
        intervals = [difference_interval(best, counts_of(each)) for each in self.results]
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
    engine: Engine | None = None,
    progress: AnyProgress | None = None,
    **evaluation: Any,
) -> Swept:
    """Merges the recipe's models once for each value of some settings, and evaluates each merge.

    All points share the passes over the models, the decoded images and the heads. Checkpoints are in a temporary folder
    until they are evaluated. To resume an interrupted sweep, make the same call again: it merges and evaluates only what
    was left.

    Args:
        over: `method.SETTING=FIRST:LAST:STEP` or `method.SETTING=VALUE,VALUE,...`; several make a grid.
        select: a split such as `validation`, on which the best point is chosen. That point is then evaluated on the tasks'
            own split.
        keep: a folder that gets the checkpoints.
        output: a folder that gets one result for each point, and `best.json`.
        plot: a file (PNG, SVG or PDF) that gets curves over the setting that has most values, all of them numbers.
        engine: where the units run, a point on a task each. By default in this process.
        evaluation: further arguments of `evaluate`, such as `tasks`, `limit` or `dtype`.

    Raises:
        UsageError: an argument or the recipe is wrong. InputError: a model or a data set is missing, damaged or does not fit.
        FailedUnitsError: units failed, and the engine was to keep going; it has the other points.
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
        warn_of_others(target, {LOG, *(each.name for each in targets)})
    kept = Path(keep) if keep is not None else None
    if kept:
        check_target(kept, folder=True)
        warn_of_others(kept, {path.name for path in point_files(points, kept)})
    engine = engine or Engine()
    check_share(engine, target)
    if kept and not engine.is_this_process:
        raise UsageError(
            "--keep: an engine's workers keep no checkpoints", "`mergecli merge --sweep` writes them"
        )
    split = evaluation.pop("split", None)
    first = points[0].recipe
    # no merge is there yet: the base stands for all, which routes no batches
    stand_in = partial(evaluate, recipe=first, only=["base"], device=device, **evaluation)
    if evaluation.get("routing") == "batch":
        stand_in = partial(stand_in, routing="sample")
    base, tasks, settings = read_arguments(first, engine, device=device, split=select or split, **evaluation)
    if not engine.keep_going:
        expect_all([base, *first.tuned.values()], first, tasks)
    if engine.is_this_process and not engine.collect:
        for each in dict.fromkeys((select or split, split)):
            check(stand_in, split=each)
    confirm = partial(stand_in, split=split) if select else None
    work_begins(
        partial(sweep_plan, points, kept, targets, device, partial(stand_in, split=select or split), confirm)
    )
    known = identities(points, settings.device)
    scoring = Scoring(base, settings)
    files = UnitFiles(target, settings.max_size, what="its images are counted")
    scratch = TemporaryDirectory(prefix="mergecli-sweep-", ignore_cleanup_errors=True)
    with scratch as temporary, shown(progress) as report, workers_stay():
        folder = Path(temporary)
        merges = MergedPoints({point.name: point for point in points}, known, folder, settings.device)

        def run(scoring: Scoring, points: Sequence[Point], engine: Engine) -> tuple[Grid, list[Failure]]:
            grid = grid_of(scoring, points, tasks, known, files)
            work = CountingWork(
                merges, base, {task.name: task for task in tasks}, scoring.settings, several=True
            )
            here = partial(count_points, grid, points, kept, folder, report)
            return grid, fill(grid, engine, work, here, report, window=WINDOW)

        grid, failures = run(scoring, points, engine)
        if engine.part:
            if failures:
                raise FailedUnitsError(failures, len(grid.units))
            return Swept(points, (), 0, select or "", None)
        results = results_of(grid, points)
        points = tuple(point for point in points if point.name in results)
        if not points:
            raise FailedUnitsError(failures, len(grid.units))
        best = max(points, key=lambda point: results[point.name].average.accuracy)
        confirmed, done = None, list(grid.units.values())
        if select is not None:
            alone = replace(engine, part=None, collect=False, keep_going=False)
            own, _ = run(scoring.on(split), [best], alone)
            confirmed = results_of(own, [best])[best.name]
            done += own.units.values()
    every = [results[point.name] for point in points]
    splits = {score.split for score in every[0].tasks.values()}
    swept = Swept(points, tuple(every), points.index(best), select or " and ".join(sorted(splits)), confirmed)
    chosen = confirmed or results[best.name]
    chosen = replace(chosen, checkpoint={**chosen.checkpoint, "selected_on": swept.chosen_on})
    by_name = {**results, "best": chosen}
    for path in targets:
        if path.stem in by_name:
            write_text(path, by_name[path.stem].to_json())
    if plot and axis:
        _draw(swept, axis, Path(plot))
    if failures:
        raise FailedUnitsError(failures, len(grid.units), swept)
    files.finish(done)
    return swept


@dataclass(frozen=True)
class MergedPoints:
    """The towers of a sweep's points, merged when they are opened first: once on each machine, while others wait."""

    points: Mapping[str, Point]
    known: Identities
    folder: Path
    """Temporary; on a machine that has no such place, a folder of its name in that machine's own."""
    device: str
    owner: str = field(default_factory=node)
    """The machine that made the folder, and removes it: what is merged there stays for a next grid of the same points."""

    @property
    def needed(self) -> Iterable[Source]:
        recipe = next(iter(self.points.values())).recipe
        return [*([recipe.base] if recipe.base else []), *recipe.tuned.values()]

    @property
    def _folder(self) -> Path:
        """The folder on this machine."""
        return self.folder if self.folder.parent.is_dir() else Path(gettempdir()) / self.folder.name

    def leave(self) -> None:
        if node() != self.owner:
            shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, name: str, stack: ExitStack) -> Tower:
        folder = self._folder
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"{name}.safetensors"
        method = self.points[name].recipe.built
        with ExitStack() as locks:
            if isinstance(method, DataDriven) or measured_by(method):
                # points that learn the same learn it once
                locks.enter_context(alone(folder / learning_key(method)))
            locks.enter_context(alone(path))
            if not path.exists():
                _make_room(folder)
                merge_batch([self.points[name]], folder, device=self.device)
            opened = stack.enter_context(open_checkpoint(path))
        other = [
            model
            for model, digest in inputs_of(opened.metadata).items()
            if self.known.inputs.get(model, digest) != digest
        ]
        if other:
            raise InputError(
                f"{name}: on {node()} {quoted(other)} have other weights than where the command was started",
                "name paths that all machines see, or fetch the recipe on each with the same lock",
            )
        return Tower(name, name, opened.vision(), identity=self.known.points[name])


def _make_room(folder: Path) -> None:
    """Removes the merges that were made first, so that those that are left and another one fit into `ROOM`; who has one open
    can read on."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    sizes = [file.stat().st_size for file in files]
    while files and sum(sizes) + sizes[0] > ROOM:
        files.pop(0).unlink(missing_ok=True)
        sizes.pop(0)


def grid_of(
    scoring: Scoring, points: Sequence[Point], tasks: Sequence[Task], known: Identities, files: UnitFiles
) -> Grid:
    """The units of the points on the scoring's split."""
    images = {task.name: scoring.images(task) for task in tasks}
    for each in images.values():
        tell(each.images)
    units = {
        (point.name, task): scoring.unit(of_task, point.name, known.points[point.name])
        for point in points
        for task, of_task in images.items()
    }
    return Grid(scoring, images, units, files, several=True)


def count_points(
    grid: Grid,
    points: Sequence[Point],
    kept: Path | None,
    folder: Path,
    progress: Progress | None,
    missing: Sequence[Unit],
    *,
    stay: bool = False,
) -> None:
    """Merges the points that have units missing, as many at a time as there is room for, and counts them in this process.

    Args:
        stay: whether merges that fit into the folder together stay there, for the next call.
    """
    wanted = {unit.of[0] for unit in missing}
    device = grid.scoring.settings.device
    batches = list(_batches([point for point in points if kept or point.name in wanted], kept))
    stay = stay and len(batches) == 1
    for batch in batches:
        files = point_files(batch, kept or folder)
        new = [point for point, path in zip(batch, files, strict=True) if kept or not path.exists()]
        if new:
            merge_batch(new, kept or folder, device=device, progress=progress)
        with ExitStack() as stack:
            towers = {
                path.stem: Tower(path.stem, path.stem, stack.enter_context(open_checkpoint(path)).vision())
                for path in files
            }
            for tower in towers.values():
                grid.scoring.check(tower, grid.tasks)
            grid.count([unit for unit in missing if unit.of[0] in towers], towers, progress)
        if not kept and not stay:
            for path in files:
                path.unlink()


def results_of(grid: Grid, points: Sequence[Point]) -> dict[str, Evaluation]:
    """Point -> its result, of those that are counted on every task."""
    scores = grid.scores()
    found: dict[str, Evaluation] = {}
    for point in points:
        if point.name in scores:
            own = scores[point.name]
            assert own.facts is not None
            result = evaluation_of(own.facts, own.tasks, grid.scoring)
            found[point.name] = _labeled(result, point)
    return found


def sweep_plan(
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
    batches = list(_batches(points, kept))
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


def _batches(points: Sequence[Point], kept: Path | None) -> Iterator[Sequence[Point]]:
    """Points whose checkpoints fit into `ROOM` together."""
    if not points:
        return
    first = points[0].recipe
    source = first.base or next(iter(first.tuned.values()))
    path = locate(source)
    size = sum(file.stat().st_size for file in (path.glob("*.safetensors") if path.is_dir() else [path]))
    share = len(points) if kept else max(1, ROOM // max(size, 1))
    for start in range(0, len(points), share):
        yield points[start : start + share]


def counts_of(result: Evaluation) -> list[Count]:
    """Correct predictions and images of each task."""
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
