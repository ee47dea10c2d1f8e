"""`evaluate`: how many images of each task a vision tower classifies rightly, and its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergecli.errors import UsageError, quoted
from mergecli.output import check_targets, write_text
from mergecli.scores import SCHEMA, Average, Evaluation, TaskScore, read_result, write_predictions
from mergecli.sources import Source, locate, parse_source

if TYPE_CHECKING:
    from mergecli.checkpoint import Checkpoint
    from mergecli.clip.tasks import Task
    from mergecli.progress import Progress
    from mergecli.recipe import Recipe

__all__ = ["SCHEMA", "Average", "Evaluation", "TaskScore", "evaluate", "read_result"]


FINE_TUNED = "fine-tuned"
"""The name of the result in which each model was evaluated on its own task."""


class _Model(NamedTuple):
    name: str
    source: Source
    checkpoint: Checkpoint
    """The vision tower only."""


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
    device: str = "cpu",
    output: str | Path | None = None,
    predictions: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Evaluation, ...]:
    """One result for each checkpoint, in order: counts, accuracy and loss on every task.

    A checkpoint is a path or a source such as `toy:digits`; a task vector is added to the base first. Text
    tower, projection and image processor are those of `clip`, which is the recipe's base unless it is given.
    Each image is decoded once, however many checkpoints there are.

    Args:
        checkpoints: sources, by themselves or under the names that their results get; none stands for all models
            of the recipe, its base first.
        only: which models of the recipe, by their names; `base` is its base.
        individual: each model only on the task that it is named after, all in one result called `fine-tuned`.
        tasks: names of tasks or sets, as a list or with commas between; else the recipe's `[eval]`, else the tasks of its `[tuned]`.
        output: a `.json` file; or a folder that gets `<name>.json` for each checkpoint.
        predictions: a Parquet file that gets a row for each image.

    Raises:
        UsageError: an argument is wrong, or the recipe.
        InputError: a checkpoint or a data set is missing, damaged or does not fit; found before the first image.
    """
    from mergecli.catalogue import named_models
    from mergecli.clip import tasks as catalogue

    tasks = tasks.split(",") if isinstance(tasks, str) else tasks
    known = _recipe(recipe)
    base = parse_source(str(clip), Path()) if clip is not None else known.base if known else None
    if base is None:
        raise UsageError("no CLIP to evaluate with", "name a recipe that has a `base`, or the base itself")
    wanted = tasks or (known.eval_tasks or tuple(known.tuned) if known else ())
    if not wanted:
        raise UsageError(
            "no tasks to evaluate on", "name tasks or a set such as `ta8`; `mergecli tasks` lists them"
        )
    chosen = [catalogue.find(name, known) for name in catalogue.expand(wanted, known)]
    size = batch_size or (known.batch_size if known else 128)
    with contextlib.ExitStack() as files:
        models = [
            _model(name, source, files)
            for name, source in named_models(checkpoints, known, only, with_base=not individual)
        ]
        if individual:
            own = {model.name for model in models}
            chosen = [task for task in chosen if task.name in own]
            if not chosen:
                raise UsageError("no model is named after one of the tasks", "name them: `TASK=PATH`")
        targets = _targets([FINE_TUNED] if individual else [model.name for model in models], output)
        inputs = {model.name: file for model in models for file in model.checkpoint.files}
        check_targets(
            dict.fromkeys(targets, ()) | ({Path(predictions): (".parquet",)} if predictions else {}), inputs
        )
        for task in chosen:
            for target in [*targets, *([Path(predictions)] if predictions else [])]:
                if task.data.path and target.absolute().is_relative_to(task.data.path.absolute()):
                    raise UsageError(
                        f"{target}: lies in the data of `{task.name}`, which is never written to"
                    )
        results, rows = _run(
            models, base, chosen, size, split, device, progress, predictions is not None, individual
        )
    for target, result in zip(targets, results, strict=False):
        write_text(target, result.to_json())
    if predictions is not None:
        write_predictions(Path(predictions), rows)
    return results


def _run(
    models: Sequence[_Model],
    base: Source,
    tasks: Sequence[Task],
    size: int,
    split: str | None,
    device: str,
    progress: Progress | None,
    keep_rows: bool,
    individual: bool,
) -> tuple[tuple[Evaluation, ...], dict[str, list[object]]]:
    """Every model's result, and the columns of the predictions' table."""
    import torch

    from mergecli.checkpoint import open_checkpoint
    from mergecli.clip.counting import Towers, count
    from mergecli.clip.heads import zero_shot_head
    from mergecli.clip.images import load_images
    from mergecli.clip.model import check_tower, load_clip
    from mergecli.clip.tasks import digest
    from mergecli.devices import usable_device

    place = usable_device(device)
    folder = locate(base)
    loaded = load_clip(folder)
    for model in models:
        check_tower(loaded, model.checkpoint)
    data = [load_images(task, split) for task in tasks]
    loaded.model.to(place)
    scores: list[dict[str, TaskScore]] = [{} for _ in models]
    rows: dict[str, list[object]] = {
        name: [] for name in ("checkpoint", "task", "index", "label", "prediction", "probability")
    }
    with torch.inference_mode():
        for task, images in zip(tasks, data, strict=True):
            classes = task.classes or images.classes or ()
            head = zero_shot_head(loaded, classes, task.templates)
            shown = [
                pair
                for pair in zip(models, scores, strict=True)
                if not individual or pair[0].name == task.name
            ]
            towers = Towers(loaded, [model.checkpoint for model, _ in shown])
            tallies = count(towers, head, images, size, task.name, progress)
            for (model, score), tally in zip(shown, tallies, strict=True):
                total = len(images)
                score[task.name] = TaskScore(
                    accuracy=tally.correct / total,
                    loss=tally.loss / total,
                    loss_batch_mean=sum(tally.batch_means) / len(tally.batch_means),
                    correct=tally.correct,
                    images=total,
                    split=images.split,
                    data={"source": task.data.label, "fingerprint": images.fingerprint},
                    classes=digest(classes),
                    templates=digest(task.templates),
                )
                if keep_rows:
                    rows["checkpoint"] += [model.name] * total
                    rows["task"] += [task.name] * total
                    rows["index"] += range(total)
                    rows["label"] += tally.labels
                    rows["prediction"] += tally.chosen
                    rows["probability"] += tally.probabilities
    with open_checkpoint(folder) as whole:
        own = whole.vision().digest()
    named = [(_about(model, own), score) for model, score in zip(models, scores, strict=True)]
    if individual:
        about = dict.fromkeys(named[0][0], None) | {
            "name": FINE_TUNED,
            "path": FINE_TUNED,
            "method": FINE_TUNED,
        }
        named = [
            (about, {task.name: score[task.name] for task in tasks for score in scores if task.name in score})
        ]
    results = tuple(
        Evaluation(
            checkpoint=about,
            clip={"path": base.label, "digest": own},
            parameters=models[0].checkpoint.parameters,
            tasks=score,
            batch_size=size,
            dtype="float32",
        )
        for about, score in named
    )
    return results, rows


def _model(name: str, source: Source, files: contextlib.ExitStack) -> _Model:
    """A checkpoint that is open until `files` close."""
    from mergecli.checkpoint import open_checkpoint

    return _Model(name, source, files.enter_context(open_checkpoint(locate(source))).vision())


def _about(model: _Model, base_digest: str) -> dict[str, str | None]:
    """What is known about a checkpoint; None where the file does not say."""
    digest, metadata = model.checkpoint.digest(), model.checkpoint.metadata
    method = metadata.get("method") or ("pretrained" if digest == base_digest else None)
    return {
        "name": model.name,
        "path": model.source.label,
        "digest": digest,
        "kind": metadata.get("kind", "checkpoint"),
        "method": method,
    }


def _recipe(recipe: str | Path | Recipe | None) -> Recipe | None:
    from mergecli.catalogue import read_recipe

    return read_recipe(recipe) if isinstance(recipe, (str, Path)) else recipe


def _targets(names: Sequence[str], output: str | Path | None) -> list[Path]:
    """The file of each result; none without an output."""
    if output is None:
        return []
    target = Path(output)
    if target.suffix == ".json":
        if len(names) > 1:
            raise UsageError(f"{target}: one file cannot hold {len(names)} results", "name a folder")
        return [target]
    if target.suffix:
        raise UsageError(f"{target}: expected a `.json` file, or a folder's name without suffix")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(
            f"{target}: two results would be called {quoted(sorted(twice))}", "evaluate them one by one"
        )
    return [target / f"{name}.json" for name in names]
