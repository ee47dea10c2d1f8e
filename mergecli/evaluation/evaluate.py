"""`evaluate`: how many images of each task a vision tower classifies correctly, and its loss."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergecli.clip.other_parts import Candidate, warn_of_other_parts
from mergecli.data.contamination import findings_of, is_test
from mergecli.evaluation.ensembles import Ensembles, ensemble_scores
from mergecli.evaluation.facts import TowerFacts
from mergecli.evaluation.features import feature_file
from mergecli.evaluation.grid import Grid, check_share, fill
from mergecli.evaluation.plan import PlannedCounts
from mergecli.evaluation.routes import Routes, route_files, write_routes
from mergecli.evaluation.scoring import Scoring, evaluation_of, tell
from mergecli.evaluation.settings import Settings, Tower, read_arguments, tasks_of
from mergecli.evaluation.work import CountingWork, OpenedTowers, opened_tower
from mergecli.formats.opening import open_source
from mergecli.hub.fetched import expect_all
from mergecli.results import plots
from mergecli.results.pools import several_pools
from mergecli.results.result import FINE_TUNED, Evaluation, Evaluations, result_files, write_predictions
from mergecli.results.suspicions import too_good
from mergecli.runtime.distributed import usable_device
from mergecli.runtime.dry_run import work_begins
from mergecli.runtime.engines.contract import Engine, Unit
from mergecli.runtime.engines.grid import Failure, Failures
from mergecli.runtime.errors import MergecliWarning, UsageError, quoted
from mergecli.runtime.progress import shown
from mergecli.storage.atomic import check_target, check_targets, warn_of_others, write_text
from mergecli.storage.sources import Source
from mergecli.storage.units import LOG as UNITS_LOG
from mergecli.storage.units import UnitFiles

if TYPE_CHECKING:
    from mergecli.data.images import TaskImages
    from mergecli.data.tasks import Task
    from mergecli.evaluation.scoring import Scores
    from mergecli.recipe.schema import Recipe
    from mergecli.results.plan import Plan
    from mergecli.runtime.progress import AnyProgress, Progress


def evaluate(
    checkpoints: str | Path | Sequence[str | Path] | Mapping[str, str | Path] = (),
    *,
    only: Sequence[str] = (),
    individual: bool = False,
    ensemble: Sequence[str] | str = (),
    ensemble_weights: Mapping[str, float] | None = None,
    recipe: str | Path | Recipe | None = None,
    clip: str | Path | None = None,
    tasks: Sequence[str] | str | None = None,
    batch_size: int | None = None,
    split: str | None = None,
    limit: int | None = None,
    corruption: str | None = None,
    severity: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    workers: int | None = None,
    cache: bool = True,
    cache_size: str | int | None = None,
    fresh: bool = False,
    routing: str = "sample",
    output: str | Path | None = None,
    predictions: str | Path | None = None,
    features: str | Path | None = None,
    routes: str | Path | None = None,
    engine: Engine | None = None,
    progress: AnyProgress | None = None,
) -> Evaluations:
    """One result for each checkpoint, in order: counts, accuracy and loss on every task.

    A checkpoint is a path or a source such as `toy:digits`; a task vector is added to the base first. Text
    tower and image processor are those of `clip`, which is the recipe's base unless it is given; so is the visual
    projection of a checkpoint that has none.
    Each image is decoded once, however many checkpoints there are, and its pixels are kept in the cache for the next
    time. To resume an interrupted evaluation, make the same call again.

    Args:
        checkpoints: sources, by themselves or under the names that their results get. Without any, all models of the
            recipe are evaluated, its base first.
        only: which models of the recipe, by their names; `base` is its base.
        individual: each model is evaluated only on the task that it is named after; all are one result, `fine-tuned`.
        ensemble: adds a result for each of these ensembles of the checkpoints, or else of the recipe's `[tuned]`, made of the same
            forward passes: `logits` and `probabilities` are means, `weighted` is a mean of logits with `ensemble_weights`, a
            number for each checkpoint's name, and `confidence` takes each image's logits from the checkpoint with the highest
            probability.
        tasks: names of tasks or sets, as a list or with commas between; else the recipe's `[eval]`, else the tasks of its `[tuned]`.
        limit: at most so many images of each task, drawn evenly over the classes, always the same ones.
        corruption: of every image after it was cropped, see `mergecli.data.corruptions`; at a `severity` from 1 to 5.
        dtype: of the tower's weights and of what it computes: float32, bfloat16 or float16.
        workers: processes that decode images; by default as many as there are processors, at most eight.
        cache: whether pixels, heads and the counts of an interrupted evaluation are kept in the cache and taken from there.
        cache_size: what the cache may grow to, such as `20GB`.
        fresh: do not resume: count again what an interrupted evaluation has counted.
        routing: `sample` routes each image by itself; `batch` routes all images of a batch alike, as in published tables.
            Then the task leaks, since a batch's images are of one task.
        output: a `.json` file; or a folder that gets `<name>.json` for each checkpoint.
        predictions: a Parquet file that gets a row for each image.
        features: a folder that gets `<task>.safetensors` with the class token after every layer for each image; of
            several checkpoints in `<name>/<task>.safetensors`.
        routes: a folder that gets `<name>.csv` for each checkpoint that routes: the mean routing weight of each expert
            over the images of each task, layer by layer; and a picture of it, `<name>.png`, where matplotlib is.
        engine: where the units run, a checkpoint on a task each. By default in this process. A part of them gives no result.

    Raises:
        UsageError: an argument is wrong, or the recipe.
        InputError: a checkpoint or a data set is missing, damaged or does not fit. This is found before the first image.
        FailedUnitsError: units failed, and the engine was to keep going; it has the results of the others.
    """
    from mergecli.recipe.reading import named_models, recipe_of

    engine = engine or Engine()
    known = recipe_of(recipe) if recipe is not None else None
    base, chosen, settings = read_arguments(
        known, engine, clip=clip, tasks=tasks, batch_size=batch_size, split=split, limit=limit, corruption=corruption,
        severity=severity, device=device, dtype=dtype, workers=workers, cache=cache, cache_size=cache_size, fresh=fresh,
        routing=routing, features=features, routes=routes, logits=bool(ensemble),
    )  # fmt: skip
    failures = Failures(engine.keep_going)
    with contextlib.ExitStack() as files:
        report = files.enter_context(shown(progress))
        named = named_models(checkpoints, known, only, with_base=not individual)
        members = [name for name, _ in _told_apart(named) if checkpoints or only or name != "base"]
        ensembles = Ensembles.of(ensemble, ensemble_weights, members, individual=individual)
        results_of = [FINE_TUNED] if individual else [*(name for name, _ in named), *ensembles.names]
        targets = result_files(results_of, output)
        used = [task for task in chosen if not individual or task.name in dict(named)]
        if not engine.keep_going:
            expect_all([base, *dict(named).values()], known, used)
        named = _told_apart(named)
        opened: list[Candidate] = []
        for name, source in named:
            with failures.of("tower", name):
                opened.append(Candidate(name, source, files.enter_context(open_source(source, base))))
        with open_source(base) as whole:
            warn_of_other_parts(opened, whole, str(base), merged=False)
            tested = [task.name for task in chosen if is_test(task.name, split)]
            _warn_of_contamination(opened, tested, individual)
            models: list[Tower] = []
            for each in opened:
                with failures.of("tower", each.name):
                    models.append(opened_tower(*each, whole)._replace(pool=_pool(each.source, known)))
        if individual:
            own = {name for name, _ in named}
            chosen = [task for task in chosen if task.name in own]
            if not chosen:
                raise UsageError(
                    f"--individual: no model is named after a task: the models are {quoted(sorted(own))}",
                    f"write `TASK=SOURCE` for each, such as `{tasks_of(tasks, known)[0].name}=tuned.safetensors`",
                )
        call = _Call(
            [name for name, _ in named],
            base,
            chosen,
            settings,
            individual,
            targets,
            output,
            predictions,
            ensembles,
        )
        work = CountingWork(
            OpenedTowers(base, dict(named)),
            base,
            {task.name: task for task in chosen},
            settings,
            call.several,
        )
        results = _evaluate_open(call, models, engine, work, failures, report)
    for text in [*(each.text for each in too_good(results)), several_pools(results)]:
        if text:
            warnings.warn(text, MergecliWarning, stacklevel=2)
    return Evaluations(results)


def _pool(source: Source, known: Recipe | None) -> str | None:
    """What a recipe says of the pool of one of its models."""
    if known is None or known.pool is None:
        return None
    return known.pool if _place(source) in map(_place, known.tuned.values()) else None


def _place(source: Source) -> object:
    """What two ways to write one source have in common."""
    return (source.path.resolve(), source.inside, source.task) if source.path else str(source)


def _warn_of_contamination(models: Sequence[Candidate], tasks: Sequence[str], individual: bool) -> None:
    """A warning for each known group of checkpoints that were trained on images on which they are evaluated."""
    found: dict[str, list[str]] = {}
    for name, source, opened in models:
        of = [task for task in tasks if task == name] if individual else tasks
        for each in findings_of(source, opened, of):
            found.setdefault(each.text, []).append(name)
    for text, names in found.items():
        warnings.warn(f"{quoted(names)}: {text}", MergecliWarning, stacklevel=2)


def _told_apart(named: Sequence[tuple[str, Source]]) -> list[tuple[str, Source]]:
    """The same with names of which each is there once: `x`, `x (2)`."""
    seen: dict[str, int] = {}
    found: list[tuple[str, Source]] = []
    for name, source in named:
        seen[name] = seen.get(name, 0) + 1
        found.append((name if seen[name] == 1 else f"{name} ({seen[name]})", source))
    return found


class _Call(NamedTuple):
    """What `evaluate` was asked for."""

    names: Sequence[str]
    base: Source
    tasks: Sequence[Task]
    settings: Settings
    individual: bool
    targets: Sequence[Path]
    """The file of each result."""
    output: str | Path | None
    predictions: str | Path | None
    ensembles: Ensembles

    @property
    def several(self) -> bool:
        """Whether features need a folder for each tower."""
        return len(self.names) > 1 and not self.individual

    @property
    def folder(self) -> Path | None:
        """The folder that the output is, if it is one."""
        return Path(self.output) if self.output is not None and Path(self.output).suffix != ".json" else None

    def pairs(self, tower: str) -> list[str]:
        """The tasks that a tower is evaluated on."""
        return [task.name for task in self.tasks if not self.individual or task.name == tower]


def _evaluate_open(
    call: _Call,
    models: Sequence[Tower],
    engine: Engine,
    work: CountingWork,
    failures: Failures,
    progress: Progress | None,
) -> tuple[Evaluation, ...]:
    """`evaluate` of towers that are open: checks the outputs, counts, and writes them."""
    settings, ensembles = call.settings, call.ensembles
    names = [FINE_TUNED] if call.individual else [*call.names, *ensembles.names]
    check_share(engine, call.folder)
    _check_files(models, call)
    if engine.is_this_process and not engine.collect:
        usable_device(settings.device)
    scoring = Scoring(call.base, settings)
    experts: dict[str, tuple[str, ...]] = {}
    for tower in models:
        with failures.of("tower", tower.name):
            experts[tower.name] = scoring.check(tower, call.pairs(tower.name))
    models = [tower for tower in models if tower.name in experts]
    scoring.check_routing(models, experts.values())
    images: dict[str, TaskImages] = {}
    for task in call.tasks:
        with failures.of("task", task.name):
            found = scoring.images(task)
            tell(found.images)
            scoring.check_prompts(found)
            images[task.name] = found
    for tower in models:
        with failures.of("tower", tower.name):
            known = [images[task] for task in call.pairs(tower.name) if task in images]
            scoring.check_heads(tower, known)
    towers = {tower.name: tower for tower in models}
    units: dict[tuple[str, str], Unit] = {}
    for name, task in [(tower, task) for tower in call.names for task in call.pairs(tower)]:
        if error := failures.found.get(("tower", name)) or failures.found.get(("task", task)):
            failures.units.append(Failure(Unit((name, task), ""), error))
        else:
            units[name, task] = scoring.unit_of(images[task], towers[name])
    total = len(units) + len(failures.units)
    files = UnitFiles(call.folder, settings.max_size, what="its images are counted")
    grid = Grid(scoring, images, units, files, call.several)
    scoring.check_features([(tower, images[task]) for tower, task in units], several=call.several)

    def planned() -> Plan:
        place = {task: number for number, task in enumerate(images)}
        pairs = sorted(units, key=lambda of: place[of[1]])  # as they are counted: task by task
        counts = [
            PlannedCounts(towers[of[0]], images[of[1]], not settings.fresh and grid.has(units[of]))
            for of in pairs
        ]
        outputs = [*call.targets, *([Path(call.predictions)] if call.predictions is not None else [])]
        return scoring.plan(counts, outputs, several=call.several)

    work_begins(planned)
    failures.units += fill(
        grid, engine, work, lambda missing: grid.count(missing, towers, progress), progress, window=len(names)
    )
    if engine.part:
        failures.check(total)
        return ()
    scores = grid.scores(predictions=call.predictions is not None)
    broken = {failure.unit.of[0] for failure in failures.units}
    complete = [tower for tower in models if tower.name in scores and tower.name not in broken]
    results = (
        _evaluations(complete, call, scoring, scores) if complete and not (call.individual and broken) else ()
    )
    finished = [tower.name for tower in complete]
    if not broken & set(ensembles.weights):
        for name, own, facts in ensemble_scores(grid, ensembles, towers, predictions=bool(call.predictions)):
            scores[name] = own
            results = (*results, evaluation_of(facts, own.tasks, scoring))
            finished.append(name)
    by_name = {result.name: result for result in results}
    for name, target in zip(names, call.targets, strict=False):
        if name in by_name:
            write_text(target, by_name[name].to_json())
    if call.predictions is not None:
        rows: dict[str, list[object]] = {}
        for task in images:  # as they are counted: task by task
            for name in finished:
                for column, values in scores[name].predictions.get(task, {}).items():
                    rows.setdefault(column, []).extend(values)
        write_predictions(Path(call.predictions), rows)
    if settings.routes is not None:
        routes = [
            Routes(tower.name, experts[tower.name], scores[tower.name].routes)
            for tower in complete
            if scores[tower.name].routes
        ]
        write_routes(routes, settings.routes)
        if plots.has_matplotlib():
            for each in routes:
                plots.route_maps(each.experts, each.tasks, route_files(settings.routes, each.name)[1])
    failures.check(total, results)
    files.finish(units.values())
    return results


def _check_files(models: Sequence[Tower], call: _Call) -> None:
    """Before any work: raises UsageError if an output cannot be written, or would replace an input; warns of what else is
    in a folder that outputs go to, of which the results have one."""
    settings = call.settings
    targets: list[tuple[Path, Sequence[str]]] = [(each, ()) for each in call.targets]
    if call.predictions is not None:
        targets.append((Path(call.predictions), (".parquet",)))
    for model, task in itertools.product(models, call.tasks):
        if call.individual and model.name != task.name:
            continue
        if file := feature_file(settings.features, model.name, task.name, call.several):
            targets.append((file, ()))
    if settings.routes is not None:
        named = [model.name for model in models if model.checkpoint.is_mixture]
        targets += [(file, ()) for name in named for file in route_files(settings.routes, name)]
    folders = [each for each in (settings.features, settings.routes, call.folder) if each is not None]
    for each in folders:
        check_target(each, folder=True)
    inputs = [(model.name, file) for model in models for file in model.checkpoint.files]
    check_targets(targets, dict(inputs))
    for task in call.tasks:
        for target, _ in targets:
            if task.data.path and target.absolute().is_relative_to(task.data.path.absolute()):
                raise UsageError(f"{target}: lies in the data of `{task.name}`, which is never written to")
    for each in folders:
        own = {file.relative_to(each).parts[0] for file, _ in targets if file.is_relative_to(each)}
        warn_of_others(each, {*own, UNITS_LOG}, [file for _, file in inputs])


def _evaluations(
    models: Sequence[Tower], call: _Call, scoring: Scoring, scores: Mapping[str, Scores]
) -> tuple[Evaluation, ...]:
    """A result for each tower; or one of all together, each on the task that it is named after."""
    facts = {tower.name: TowerFacts.of(tower, scoring.digests.vision, call.settings) for tower in models}
    if not call.individual:
        return tuple(evaluation_of(facts[tower.name], scores[tower.name].tasks, scoring) for tower in models)
    own = {task: scores[task].tasks[task] for task in (each.name for each in call.tasks)}
    about: dict[str, str | None] = {"name": FINE_TUNED, "path": FINE_TUNED, "digest": None, "kind": None, "method": FINE_TUNED}  # fmt: skip
    size = sum(facts[tower.name].bytes for tower in models if tower.name in own)
    together = TowerFacts(
        about,
        facts[models[0].name].parameters,
        size,
        {tower.name: tower.label for tower in models},
        pool=models[0].pool,
        has_projection=any(each.has_projection for each in facts.values()),
    )
    return (evaluation_of(together, own, scoring),)
