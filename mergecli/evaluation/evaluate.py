"""`evaluate`: how many images of each task a vision tower classifies correctly, and its loss."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mergecli.clip.other_parts import Candidate, warn_of_other_parts
from mergecli.data.contamination import findings_of, is_test
from mergecli.evaluation.features import feature_file
from mergecli.evaluation.routes import route_files, write_routes
from mergecli.evaluation.scoring import score
from mergecli.evaluation.settings import Settings, Tower
from mergecli.formats.mixture import LEFT_OUT, mixture_of
from mergecli.formats.opening import model_path, open_source
from mergecli.hub.fetched import expect_all
from mergecli.results import plots
from mergecli.results.result import FINE_TUNED, Evaluation, Evaluations, result_files, write_predictions
from mergecli.results.suspicions import too_good
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError, quoted
from mergecli.runtime.progress import shown
from mergecli.storage.atomic import check_target, check_targets, warn_of_others, write_text
from mergecli.storage.metadata import looked_at, made_of
from mergecli.storage.sources import Source, parse_source

if TYPE_CHECKING:
    from mergecli.data.tasks import Task
    from mergecli.evaluation.settings import Scores
    from mergecli.methods._mixture import Routing
    from mergecli.recipe.schema import Recipe
    from mergecli.runtime.progress import AnyProgress, Progress
    from mergecli.storage.checkpoint import Checkpoint


def evaluate(
    checkpoints: str | Path | Sequence[str | Path] | Mapping[str, str | Path] = (),
    *,
    only: Sequence[str] = (),
    individual: bool = False,
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
    progress: AnyProgress | None = None,
    unfinished: list[Path] | None = None,
) -> Evaluations:
    """One result for each checkpoint, in order: counts, accuracy and loss on every task.

    A checkpoint is a path or a source such as `toy:digits`; a task vector is added to the base first. Text
    tower, projection and image processor are those of `clip`, which is the recipe's base unless it is given.
    Each image is decoded once, however many checkpoints there are, and its pixels are kept in the cache for the next
    time. To resume an interrupted evaluation, make the same call again.

    Args:
        checkpoints: sources, by themselves or under the names that their results get. Without any, all models of the
            recipe are evaluated, its base first.
        only: which models of the recipe, by their names; `base` is its base.
        individual: each model is evaluated only on the task that it is named after; all are one result, `fine-tuned`.
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
        unfinished: a list that gets the files from which an interrupted evaluation resumes. They stay then, until
            `forget` removes them: for work that has several evaluations.

    Raises:
        UsageError: an argument is wrong, or the recipe.
        InputError: a checkpoint or a data set is missing, damaged or does not fit. This is found before the first image.
    """
    from mergecli.data.decoding import Corruption
    from mergecli.recipe.reading import named_models, recipe_of
    from mergecli.storage.cache import allowed_size

    known = recipe_of(recipe) if recipe is not None else None
    base = parse_source(str(clip), Path()) if clip is not None else known.base if known else None
    if base is None:
        raise UsageError(
            "there is no CLIP to evaluate with",
            "name it with `--clip`, or a recipe that has a `base` with `--recipe`",
        )
    chosen = tasks_of(tasks, known)
    settings = Settings(
        batch_size=batch_size if batch_size is not None else known.batch_size if known else 128,
        split=split,
        limit=limit,
        corruption=Corruption(corruption, severity) if corruption else None,
        device=device,
        dtype=dtype,
        workers=workers,
        max_size=allowed_size(cache_size) if cache else 0,
        fresh=fresh,
        routing=cast("Routing", routing),
        features=Path(features) if features is not None else None,
        routes=Path(routes) if routes is not None else None,
    )
    named = named_models(checkpoints, known, only, with_base=not individual)
    used = [task for task in chosen if not individual or task.name in dict(named)]
    expect_all([base, *dict(named).values(), *(task.data for task in used)], known)
    with contextlib.ExitStack() as files:
        report = files.enter_context(shown(progress))
        opened = [
            Candidate(name, source, files.enter_context(open_source(source, base))) for name, source in named
        ]
        with open_source(base) as whole:
            warn_of_other_parts(opened, whole, str(base), merged=False)
        tested = [task.name for task in chosen if is_test(task.name, split)]
        _warn_of_contamination(opened, tested, individual)
        models = [_tower(*each) for each in opened]
        if individual:
            own = {model.name for model in models}
            chosen = [task for task in chosen if task.name in own]
            if not chosen:
                raise UsageError(
                    f"--individual: no model is named after a task: the models are {quoted(sorted(own))}",
                    f"write `TASK=SOURCE` for each, such as `{tasks_of(tasks, known)[0].name}=tuned.safetensors`",
                )
        results = _evaluate_open(
            models, base, chosen, settings, individual=individual, output=output, predictions=predictions,
            progress=report, unfinished=unfinished,
        )  # fmt: skip
    for each in too_good(results):
        warnings.warn(each.text, MergecliWarning, stacklevel=2)
    return Evaluations(results)


def _warn_of_contamination(models: Sequence[Candidate], tasks: Sequence[str], individual: bool) -> None:
    """A warning for each known group of checkpoints that were trained on images on which they are evaluated."""
    found: dict[str, list[str]] = {}
    for name, source, opened in models:
        of = [task for task in tasks if task == name] if individual else tasks
        for each in findings_of(source, opened, of):
            found.setdefault(each.text, []).append(name)
    for text, names in found.items():
        warnings.warn(f"{quoted(names)}: {text}", MergecliWarning, stacklevel=2)


def tasks_of(tasks: Sequence[str] | str | None, recipe: Recipe | None) -> list[Task]:
    """The tasks that are named, else those of the recipe's `[eval]`, else those of its `[tuned]`.

    Raises:
        UsageError: there are none, or one is unknown.
    """
    from mergecli.data import tasks as registry

    named = tasks.split(",") if isinstance(tasks, str) else tasks
    wanted = named or ((recipe.eval_tasks or tuple(recipe.tuned)) if recipe else ())
    if not wanted:
        raise UsageError(
            "there are no tasks to evaluate on",
            "name tasks or a set such as `ta8` with `--task`; `mergecli tasks` lists them",
        )
    return [registry.find(name, recipe) for name in registry.expand(wanted, recipe)]


def _evaluate_open(
    models: Sequence[Tower],
    base: Source,
    tasks: Sequence[Task],
    settings: Settings,
    *,
    individual: bool = False,
    output: str | Path | None = None,
    predictions: str | Path | None = None,
    progress: Progress | None = None,
    unfinished: list[Path] | None = None,
) -> tuple[Evaluation, ...]:
    """`evaluate` of towers that are open: checks the outputs, counts, and writes them."""
    targets = result_files([FINE_TUNED] if individual else [model.name for model in models], output)
    folder = Path(output) if output is not None and Path(output).suffix != ".json" else None
    _check_files(models, tasks, settings, targets, folder, predictions, individual)

    scores = score(
        models,
        model_path(base),
        tasks,
        settings,
        own_task_only=individual,
        predictions=predictions is not None,
        outputs=[*targets, *([Path(predictions)] if predictions is not None else [])],
        progress=progress,
    )
    names = [task.name for task in tasks] if individual else None
    results = _evaluations(models, base, scores, settings, names)
    for target, result in zip(targets, results, strict=False):
        write_text(target, result.to_json())
    if predictions is not None:
        write_predictions(Path(predictions), scores.predictions)
    if settings.routes is not None:
        write_routes(scores.routes, settings.routes)
        if plots.has_matplotlib():
            for each in scores.routes:
                plots.route_maps(each.experts, each.tasks, route_files(settings.routes, each.name)[1])
    if unfinished is None:
        forget(scores.unfinished)
    else:
        unfinished += scores.unfinished
    return results


def _check_files(
    models: Sequence[Tower],
    tasks: Sequence[Task],
    settings: Settings,
    results: Sequence[Path],
    folder: Path | None,
    predictions: str | Path | None,
    individual: bool,
) -> None:
    """Before any work: raises UsageError if an output cannot be written, or would replace an input; warns of what else is
    in a folder that outputs go to, of which the `results` have one."""
    targets: list[tuple[Path, Sequence[str]]] = [(each, ()) for each in results]
    if predictions is not None:
        targets.append((Path(predictions), (".parquet",)))
    several = len(models) > 1 and not individual
    for model, task in itertools.product(models, tasks):
        if individual and model.name != task.name:
            continue
        if file := feature_file(settings.features, model.name, task.name, several):
            targets.append((file, ()))
    if settings.routes is not None:
        named = [model.name for model in models if model.checkpoint.is_mixture]
        targets += [(file, ()) for name in named for file in route_files(settings.routes, name)]
    folders = [each for each in (settings.features, settings.routes, folder) if each is not None]
    for each in folders:
        check_target(each, folder=True)
    inputs = [(model.name, file) for model in models for file in model.checkpoint.files]
    check_targets(targets, dict(inputs))
    for task in tasks:
        for target, _ in targets:
            if task.data.path and target.absolute().is_relative_to(task.data.path.absolute()):
                raise UsageError(f"{target}: lies in the data of `{task.name}`, which is never written to")
    for each in folders:
        own = {file.relative_to(each).parts[0] for file, _ in targets if file.is_relative_to(each)}
        warn_of_others(each, own, [file for _, file in inputs])


def _evaluations(
    models: Sequence[Tower],
    base: Source,
    scores: Scores,
    settings: Settings,
    individual: Sequence[str] | None,
) -> tuple[Evaluation, ...]:
    """A result for each tower; or one of all together, each on its own of the `individual` tasks."""
    sizes = [model.checkpoint.nbytes for model in models]
    with open_source(base) as whole:
        tower_size = whole.vision().nbytes
    digests = {"digest": scores.clip.vision, "text": scores.clip.text, "rest": scores.clip.rest}
    result = partial(
        Evaluation,
        clip={"path": base.label, **digests, "processing": scores.processing},
        batch_size=settings.batch_size,
        dtype=settings.dtype,
        device=settings.device.partition(":")[0],
    )
    if individual is not None:
        own = {name: each for one in scores.tasks for name, each in one.items()}
        size = sum(size for size, each in zip(sizes, scores.tasks, strict=True) if each)
        together = result(
            checkpoint={"name": FINE_TUNED, "path": FINE_TUNED, "digest": None, "kind": None, "method": FINE_TUNED},
            parameters=_parameters(models[0].checkpoint),
            tasks={name: own[name] for name in individual},
            bytes=size,
            relative_size=size / tower_size,
            models={model.name: model.label for model in models},
        )  # fmt: skip
        return (together,)
    return tuple(
        result(
            checkpoint=_checkpoint_facts(model, scores.clip.vision, settings),
            parameters=_parameters(model.checkpoint),
            tasks=tasks,
            bytes=size,
            relative_size=size / tower_size,
            models=made_of(model.checkpoint.metadata)[1],
            looked_at=looked_at(model.checkpoint.metadata),
        )
        for model, size, tasks in zip(models, sizes, scores.tasks, strict=True)
    )


def _checkpoint_facts(tower: Tower, base_digest: str, settings: Settings) -> dict[str, str | None]:
    """What `Evaluation.checkpoint` says of it; None where the file does not say."""
    digest, metadata = tower.checkpoint.digest(), tower.checkpoint.metadata
    method = metadata.get("method") or ("pretrained" if digest == base_digest else None)
    kind = metadata.get("kind", "checkpoint")
    found = {"name": tower.name, "path": tower.label, "digest": digest, "kind": kind, "method": method}
    if tower.checkpoint.is_mixture:
        mixture = mixture_of(tower.checkpoint)
        found["routing"] = mixture.routing(settings.routing) or "task"
        if mixture.has_heads:
            found["heads"] = "learned"
    return found | made_of(metadata)[0]


def _parameters(checkpoint: Checkpoint) -> int:
    """Entries of all tensors; in a mixture only of those in floating point, since masks are no parameters."""
    counts = [
        entry.size for entry in checkpoint.entries.values() if entry.is_float or not checkpoint.is_mixture
    ]
    return sum(counts)


def forget(files: Sequence[Path]) -> None:
    """Removes the files from which an interrupted evaluation would have resumed."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _tower(name: str, source: Source, opened: Checkpoint) -> Tower:
    """The vision tower of an open checkpoint; raises InputError if something of it is missing."""
    opened = opened.vision()
    if left_out := opened.metadata.get(LEFT_OUT):
        raise InputError(
            f"{source}: is a tower without {left_out}, which the method's accuracy comes from",
            "evaluate the whole file, on this task with `--task`",
        )
    return Tower(name, source.label, opened)
