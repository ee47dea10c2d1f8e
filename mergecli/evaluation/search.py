"""`search`: settings that are proposed, merged and evaluated trial by trial, and the best of them on images that the search never saw."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from mergecli.evaluation.evaluate import evaluate
from mergecli.evaluation.grid import fill
from mergecli.evaluation.scoring import Scoring, tell
from mergecli.evaluation.search_space import Space
from mergecli.evaluation.settings import read_arguments
from mergecli.evaluation.study import Study, Trial, check_sampler
from mergecli.evaluation.study_database import check_storage, storage_url
from mergecli.evaluation.sweep import (
    WINDOW,
    MergedPoints,
    count_points,
    grid_of,
    results_of,
    sweep_plan,
)
from mergecli.evaluation.work import CountingWork
from mergecli.hub.fetched import expect_all
from mergecli.merging.sweep_points import Point, identities, model_digests
from mergecli.recipe.reading import recipe_of
from mergecli.results import plots
from mergecli.results.cells import Cell, Column
from mergecli.results.plan import check
from mergecli.results.result import Evaluation
from mergecli.results.statistics import Count, difference_interval
from mergecli.results.tables import Table
from mergecli.runtime import interrupts
from mergecli.runtime.counts import is_count
from mergecli.runtime.dry_run import work_begins
from mergecli.runtime.engines.contract import Engine
from mergecli.runtime.engines.grid import FailedUnitsError, workers_stay
from mergecli.runtime.errors import UsageError, did_you_mean, either, quoted, toml_text
from mergecli.runtime.notes import note
from mergecli.runtime.progress import AnyProgress, Progress, shown
from mergecli.storage.atomic import check_target, check_targets, write_text
from mergecli.storage.units import UnitFiles

if TYPE_CHECKING:
    from mergecli.data.tasks import Task
    from mergecli.storage.sources import Source

MOST = 10_000
"""The most trials of one search; more is taken for a typing error."""
OBJECTIVES = ("average", "worst")
STATES = {"running": "running", "complete": "", "pruned": "pruned", "failed": "failed"}


class _Stage(NamedTuple):
    """How far a trial is counted before it is compared with others."""

    tasks: tuple[str, ...]
    limit: int | None


@dataclass(frozen=True)
class Searched:
    """What a search found."""

    trials: tuple[Trial, ...]
    """All of the study, by their numbers."""
    best: int
    """The number of the complete trial of highest objective; of several the first."""
    objective: str
    chosen_on: str
    """The split whose images the trials were compared on."""
    confirmed: Evaluation
    """The best trial on the tasks' own split, which no trial has seen."""
    importance: Mapping[str, float]
    """Setting -> share of what the objective depends on, the most important first; empty where there are too few trials."""
    command: str
    """What merges the best trial again."""

    @property
    def table(self) -> Table:
        """A row a trial: its settings, the accuracy on each task, the objective, and a mark for the best and those near it."""
        keys = list(dict.fromkeys(key for trial in self.trials for key in trial.values))
        tasks = list(self.confirmed.tasks)
        name = self.objective if self.objective in OBJECTIVES else f"{self.objective} (objective)"
        columns = [
            Column("trial", "count"),
            *map(Column, keys),
            *(Column(task, "percent") for task in (*tasks, name)),
        ]
        near = self.near
        rows: list[tuple[Cell, ...]] = []
        for trial in self.trials:
            values = [_cell(trial.values.get(key)) for key in keys]
            scores = [
                each.correct / each.images if (each := trial.counts.get(task)) else None for task in tasks
            ]
            mark = (
                "best" if trial.slot == self.best else "n.s." if trial.slot in near else STATES[trial.outcome]
            )
            rows.append((trial.slot, *values, *scores, trial.objective, mark))
        return Table((*columns, Column(f"on {self.chosen_on}")), tuple(rows), notes=(self.note,))

    @property
    def near(self) -> list[int]:
        """Trials whose objective does not differ significantly from the best one's: the 95 % interval of the difference, as if
        they had seen different images, contains 0."""
        best = self._counts(self._trial(self.best))
        intervals = {
            trial.slot: difference_interval(best, self._counts(trial))
            for trial in self.trials
            if trial.outcome == "complete" and trial.slot != self.best
        }
        return [slot for slot, each in intervals.items() if each.low <= 0 <= each.high]

    def _trial(self, slot: int) -> Trial:
        return next(each for each in self.trials if each.slot == slot)

    def _counts(self, trial: Trial) -> list[Count]:
        """What the objective is the mean of."""
        if self.objective == "average":
            return list(trial.counts.values())
        if self.objective == "worst":
            return [min(trial.counts.values(), key=lambda each: each.correct / each.images)]
        return [trial.counts[self.objective]]

    @property
    def note(self) -> str:
        """What may be concluded of the best trial."""
        best = self._trial(self.best)
        own = _objective({task: each.accuracy for task, each in self.confirmed.tasks.items()}, self.objective)
        text = (
            f"trial {best.slot} is the best on {self.chosen_on} with {100 * (best.objective or 0):.1f} %; "
            f"on the tasks' own split, which the search never saw, it has {100 * own:.1f} %"
        )
        if self.near:
            text += f". n.s.: chance alone may put it before these {len(self.near)}"
        return text

    @property
    def importance_table(self) -> Table:
        """A row a setting, the most important first."""
        rows = tuple((key, share) for key, share in self.importance.items())
        return Table((Column("setting"), Column("importance", "percent")), rows)


def search(
    recipe: str | Path,
    space: Sequence[str],
    *,
    output: str | Path,
    trials: int = 40,
    sampler: str = "tpe",
    objective: str = "average",
    split: str = "validation",
    seed: int = 0,
    prune: bool = False,
    storage: str | None = None,
    study: str = "search",
    method: str | None = None,
    changes: Sequence[str] = (),
    tasks: Sequence[str] | str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    workers: int | None = None,
    cache: bool = True,
    cache_size: str | int | None = None,
    engine: Engine | None = None,
    progress: AnyProgress | None = None,
) -> Searched:
    """Searches the settings whose merge of the recipe's models is best.

    Trials that are proposed together share the passes over the models, and all share decoded images and heads. To resume an
    interrupted search, make the same call again; with more `trials` it goes on. Several processes may make the call at once:
    they share the trials of one study.

    Args:
        space: `method.SETTING=LOW:HIGH`, with `:log` or `:STEP` behind it, or `method.SETTING=VALUE,VALUE,...`; also
            `method.name` and settings by layer. A setting that a trial's method has not is left out.
        output: a folder that gets `best.json`, `trials.csv`, `parallel.png` where matplotlib is, and the study.
        trials: how many there are in all.
        sampler: tpe, sobol, cmaes, random or grid.
        objective: what is made large: the `average` accuracy, that of the `worst` task, or of the task of this name.
        split: whose images the trials are compared on; not that of the report.
        seed: of the sampler.
        prune: whether trials stop early that are in the worse half after a part of the tasks, or of the images if there is a
            `limit`.
        storage: the address of a database for the study, such as `postgresql://...`, or a file of SQLite; by default
            `study.db` in the output.
        study: its name in the database.

    Raises:
        UsageError: an argument is wrong, or Optuna is missing.
        InputError: a model or a data set is missing or damaged, or the database cannot be opened.
    """
    known = recipe_of(recipe, method=method, changes=changes)
    searched = Space.of(space, known)
    if not (is_count(trials) and trials <= MOST):
        raise UsageError(f"--trials: expected a whole number from 1 to {MOST:,}, got {trials!r}")
    check_sampler(sampler, searched)
    folder = Path(output)
    check_storage(storage_url(storage, folder))
    if folder.suffix:
        raise UsageError(f"{folder}: a search has several results, so the output is a folder")
    check_target(folder, folder=True)
    targets = [folder / "best.json", folder / "trials.csv"]
    check_targets([(each, ()) for each in targets], {})
    ends = [_point(searched, values) for values in searched.ends()]
    engine = engine or Engine()
    if option := "--part" if engine.part else "--collect" if engine.collect else None:
        raise UsageError(
            f"{option}: the trials of a search are not known before",
            "run the same command on each machine: they share one study (`--storage`)",
        )
    how: dict[str, Any] = {
        "tasks": tasks, "limit": limit, "batch_size": batch_size, "dtype": dtype, "workers": workers, "cache": cache,
        "cache_size": cache_size,
    }  # fmt: skip
    base, chosen, settings = read_arguments(known, engine, device=device, split=split, **how)
    names = [task.name for task in chosen]
    if objective not in (*OBJECTIVES, *names):
        near = did_you_mean(objective, (*OBJECTIVES, *names))
        raise UsageError(f"--objective: expected {either((*OBJECTIVES, *names))}, got `{objective}`{near}")
    expect_all([base, *known.tuned.values()], known, chosen)
    stand_in = partial(evaluate, recipe=known, only=["base"], device=device, split=split, **how)
    confirmation = partial(stand_in, split=None, limit=None)
    check(stand_in)
    check(confirmation)
    work_begins(
        lambda: sweep_plan(
            [ends[number % len(ends)] for number in range(trials)], None, targets, device,
            stand_in, confirmation,
        )
    )  # fmt: skip
    scoring = Scoring(base, settings)
    data = _images(scoring, chosen, split)
    inputs = model_digests(ends)
    facts: dict[str, Any] = {
        "space": [each.text for each in searched.dimensions], "objective": objective, "split": split, "limit": settings.limit,
        "prune": prune, "seed": seed, "method": known.method, "settings": toml_text(known.settings), "models": inputs,
        "data": data, "dtype": dtype,
    }  # fmt: skip
    with shown(progress) as report:
        folder.mkdir(parents=True, exist_ok=True)
        opened = Study(storage_url(storage, folder), study, searched, trials, sampler, seed, facts)
        files = UnitFiles(folder, settings.max_size, what="its images are counted")
        run = _Run(opened, searched, scoring, chosen, base, inputs, files, engine, objective, prune, report)
        with workers_stay():
            with interrupts.telling(opened.kept):
                _do_all(run)
            found = opened.trials
            complete = [each for each in found if each.outcome == "complete"]
            best = max(complete, key=lambda each: each.objective or 0.0)
            confirmed = run.confirm(best)
    confirmed = replace(confirmed, checkpoint={**confirmed.checkpoint, "selected_on": split})
    done = Searched(
        tuple(found), best.slot, objective, split, confirmed, opened.importance(), _command(recipe, method, changes, searched, best)
    )  # fmt: skip
    write_text(targets[0], confirmed.to_json())
    write_text(targets[1], done.table.text("csv"))
    if plots.has_matplotlib():
        axes = {each.key.removeprefix("method."): _axis(each.key, found) for each in searched.dimensions}
        figure = plots.parallel(
            axes, [100 * (each.objective or 0.0) for each in found if each.outcome == "complete"],
            label=f"{objective} on {split} (%)", best=complete.index(best),
        )  # fmt: skip
        plots.save(figure, folder / "parallel.png")
    return done


@dataclass
class _Run:
    """One process of a search."""

    study: Study
    space: Space
    scoring: Scoring
    tasks: Sequence[Task]
    base: Source
    inputs: Mapping[str, str]
    files: UnitFiles
    engine: Engine
    objective: str
    prune: bool
    progress: Progress | None

    @property
    def stages(self) -> list[_Stage]:
        """How far trials are counted before the worse half is pruned: half of the tasks, the objective's first; or a quarter and
        half of the images, where there is a limit."""
        names, limit = [task.name for task in self.tasks], self.scoring.settings.limit
        names.sort(key=lambda name: name != self.objective)
        last = _Stage(tuple(names), limit)
        if not self.prune:
            return [last]
        if limit is not None:
            limits = dict.fromkeys(math.ceil(limit / part) for part in (4, 2))
            return [*(_Stage(tuple(names), each) for each in limits if each < limit), last]
        counts = dict.fromkeys(math.ceil(len(names) / part) for part in (4, 2))
        return [*(_Stage(tuple(names[:each]), None) for each in counts if each < len(names)), last]

    def batch(self, trials: Sequence[Trial]) -> None:
        """Merges trials in one pass, and evaluates them stage by stage."""
        points = {trial.slot: _point(self.space, trial.values) for trial in trials}
        alive, stages = list(trials), self.stages
        with TemporaryDirectory(prefix="mergecli-search-", ignore_cleanup_errors=True) as temporary:
            for number, stage in enumerate(stages, 1):
                scoring = self.scoring.with_limit(stage.limit, self.scoring.settings.split)
                found = self._results(
                    scoring, [points[each.slot] for each in alive], stage.tasks, Path(temporary)
                )
                ended: list[Trial] = []
                for trial in alive:
                    scores = found[points[trial.slot].name].tasks
                    counts = {task: Count(each.correct, each.images) for task, each in scores.items()}
                    value = _objective({task: each.accuracy for task, each in scores.items()}, self.objective)
                    ended.append(replace(trial, counts=counts, objective=value))
                    self.study.tell(ended[-1], number)
                if number == len(stages):
                    for trial in ended:
                        self.study.finish(trial)
                    return
                middle = self.study.middle(number)
                alive = [trial for trial in ended if (trial.objective or 0.0) >= middle]
                for trial in ended:
                    if trial not in alive:
                        self.study.prune(trial)

    def confirm(self, trial: Trial) -> Evaluation:
        """The trial on the tasks' own split, on all its images."""
        scoring = self.scoring.with_limit(None, None)
        point = _point(self.space, trial.values)
        with TemporaryDirectory(prefix="mergecli-search-", ignore_cleanup_errors=True) as temporary:
            names = [task.name for task in self.tasks]
            return self._results(scoring, [point], names, Path(temporary))[point.name]

    def _results(
        self, scoring: Scoring, points: Sequence[Point], tasks: Sequence[str], folder: Path
    ) -> dict[str, Evaluation]:
        """Point -> its result on the tasks. Trials may be the same point."""
        by_name = {point.name: point for point in points}
        unique = list(by_name.values())
        device = scoring.settings.device
        known = identities(unique, device, self.inputs)
        chosen = [next(task for task in self.tasks if task.name == name) for name in tasks]
        grid = grid_of(scoring, unique, chosen, known, self.files)
        merges = MergedPoints(by_name, known, folder, device)
        work = CountingWork(
            merges, self.base, {task.name: task for task in chosen}, scoring.settings, several=True
        )
        here = partial(count_points, grid, unique, None, folder, self._tell, stay=True)
        failures = fill(grid, self.engine, work, here, self._tell, window=WINDOW)
        if failures:
            raise FailedUnitsError(failures, len(grid.units))
        return results_of(grid, unique)

    def _tell(self, what: str, done: int, total: int) -> None:
        self.study.sign()
        if self.progress:
            self.progress(what, done, total)


def _do_all(run: _Run) -> None:
    """Does trials until all slots are taken, and waits for those of other processes."""
    waits = False
    while True:
        interrupts.check()
        claimed = run.study.claim()
        if not claimed:
            if not run.study.others:
                return
            if not waits:
                note(f"waiting for {run.study.others} trials of other processes")
            waits = True
            time.sleep(0.5)
            continue
        try:
            run.batch(claimed)
        except BaseException:
            with suppress(Exception):
                run.study.give_up(claimed)
            raise
        ended = [each for each in run.study.trials if each.outcome in ("complete", "pruned")]
        complete = [each for each in ended if each.outcome == "complete"]
        if not complete:
            continue
        best = max(complete, key=lambda each: each.objective or 0.0)
        note(
            f"{len(ended)} of {run.study.slots} trials; the best is {best.slot} with {100 * (best.objective or 0.0):.1f} %"
        )


def _images(scoring: Scoring, tasks: Sequence[Task], split: str) -> dict[str, str]:
    """Task -> digest of the images on which trials are compared.

    Raises:
        UsageError: the report would be on the same images.
    """
    own, found = scoring.with_limit(None, None), dict[str, str]()
    same: list[str] = []
    for task in tasks:
        images = scoring.images(task).images
        tell(images)
        found[task.name] = images.fingerprint
        if images.split == own.images(task).images.split:
            same.append(task.name)
    if same:
        raise UsageError(
            f"--split {split}: the best is reported on this split of {quoted(same)}, which the search must not see",
            "`--split validation` takes a tenth of the training images where the data have no validation split",
        )
    return found


def _point(space: Space, values: Mapping[str, Any]) -> Point:
    """The recipe with these values."""
    return Point(dict(values), recipe_of(space.recipe, overrides=space.overrides(values)))


def _objective(accuracies: Mapping[str, float], objective: str) -> float:
    """What is made large, of the accuracies on some or all tasks."""
    if objective == "worst":
        return min(accuracies.values())
    return accuracies[objective] if objective in accuracies else sum(accuracies.values()) / len(accuracies)


def _command(
    recipe: str | Path, method: str | None, changes: Sequence[str], space: Space, best: Trial
) -> str:
    """What merges a trial again."""
    name = best.values.get("method.name", method)
    own = [
        f"{each.key}={toml_text(each.value)}" for each in space.overrides(best.values) if each.key != "method"
    ]
    words = ["mergecli", "merge", str(recipe), *(["--method", str(name)] if name else [])]
    words += [word for each in (*changes, *own) for word in ("--set", each)]
    return f"{shlex.join(words)} -o best.safetensors"


def _cell(value: Any) -> Cell:
    return value if value is None or isinstance(value, int | float | str) else toml_text(value)


def _axis(key: str, trials: Sequence[Trial]) -> list[Any]:
    """The values of a setting in the complete trials; None where the method has it not."""
    return [_cell(each.values.get(key)) for each in trials if each.outcome == "complete"]
