"""What results say of the checkpoints that they are about, and the files that they may replace."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.clip.features import feature_file
from mergecli.clip.routes import route_files
from mergecli.errors import UsageError
from mergecli.mixtures import mixture_of
from mergecli.output import check_target, check_targets
from mergecli.provenance import looked_at, made_of
from mergecli.scores import FINE_TUNED, TaskScore

if TYPE_CHECKING:
    from mergecli.checkpoint import Checkpoint
    from mergecli.clip.scoring import Scores, Settings, Tower
    from mergecli.clip.tasks import Task


@dataclass(frozen=True)
class Subject:
    """What one result is about, and its scores; see `mergecli.scores.Evaluation`."""

    checkpoint: Mapping[str, str | None]
    parameters: int
    bytes: int
    tasks: Mapping[str, TaskScore]
    models: Mapping[str, str]
    looked_at: Mapping[str, Mapping[str, str]]


def subjects(
    models: Sequence[Tower], scores: Scores, settings: Settings, tasks: Sequence[str], individual: bool
) -> list[Subject]:
    """A subject for each tower, or one of all together, each on its own task."""
    sizes = [model.checkpoint.nbytes for model in models]
    counts = [parameters(model.checkpoint) for model in models]
    if individual:
        own = {name: each for one in scores.tasks for name, each in one.items()}
        facts = {"name": FINE_TUNED, "path": FINE_TUNED, "digest": None, "kind": None, "method": FINE_TUNED}
        size = sum(size for size, each in zip(sizes, scores.tasks, strict=True) if each)
        sources = {model.name: model.label for model in models}
        return [Subject(facts, counts[0], size, {name: own[name] for name in tasks}, sources, {})]
    metadata = [model.checkpoint.metadata for model in models]
    return [
        Subject(
            _about(model, scores.clip.vision, settings), count, size, each, made_of(told)[1], looked_at(told)
        )
        for model, count, size, each, told in zip(models, counts, sizes, scores.tasks, metadata, strict=True)
    ]


def _about(tower: Tower, base_digest: str, settings: Settings) -> dict[str, str | None]:
    """What is known about a checkpoint; None where the file does not say."""
    digest, metadata = tower.checkpoint.digest(), tower.checkpoint.metadata
    method = metadata.get("method") or ("pretrained" if digest == base_digest else None)
    kind = metadata.get("kind", "checkpoint")
    found = {"name": tower.name, "path": tower.label, "digest": digest, "kind": kind, "method": method}
    if tower.checkpoint.is_mixture:
        found["routing"] = mixture_of(tower.checkpoint).routing(settings.routing) or "task"
    return found | made_of(metadata)[0]


def parameters(checkpoint: Checkpoint) -> int:
    """Entries of all tensors; of a mixture, whose masks are no parameters, of the floating point ones."""
    counts = [
        entry.size for entry in checkpoint.entries.values() if entry.is_float or not checkpoint.is_mixture
    ]
    return sum(counts)


def check_files(
    models: Sequence[Tower],
    tasks: Sequence[Task],
    settings: Settings,
    results: Sequence[Path],
    predictions: str | Path | None,
    individual: bool,
) -> None:
    """Raises UsageError unless everything can be written and replaces no input: found before the work, not after it."""
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
    check_targets(targets, {model.name: file for model in models for file in model.checkpoint.files})
    for folder in (settings.features, settings.routes):
        if folder is not None:
            check_target(folder, folder=True)
    for task in tasks:
        for target, _ in targets:
            if task.data.path and target.absolute().is_relative_to(task.data.path.absolute()):
                raise UsageError(f"{target}: lies in the data of `{task.name}`, which is never written to")
