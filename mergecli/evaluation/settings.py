"""How an evaluation computes, what of that arguments say, and the tower it is about."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from mergecli.data.decoding import Corruption
from mergecli.methods._mixture import Routing
from mergecli.runtime.counts import count
from mergecli.runtime.engines.contract import Engine
from mergecli.runtime.errors import UsageError, did_you_mean
from mergecli.storage.sources import Source, parse_source

if TYPE_CHECKING:
    from mergecli.data.tasks import Task
    from mergecli.recipe.schema import Recipe
    from mergecli.storage.checkpoint import Checkpoint

ROUTINGS = ("sample", "batch")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """How to evaluate."""

    batch_size: int = 128
    split: str | None = None
    """A split to evaluate on in place of each task's own."""
    limit: int | None = None
    """At most so many images of each task, about equally many of each class."""
    corruption: Corruption | None = None
    device: str = "cpu"
    dtype: str = "float32"
    """Of the tower's weights and activations; heads and logits are always float32."""
    workers: int | None = None
    max_size: int = 0
    """Bytes that the cache may grow to; 0 uses none."""
    fresh: bool = False
    """Whether not to resume an interrupted evaluation."""
    routing: Routing = "sample"
    """Whether towers that route do so for each image by itself, or for all images of a batch alike."""
    features: Path | None = None
    """The folder that gets the features of every layer."""
    routes: Path | None = None
    """The folder that gets the routes of towers that route."""
    logits: bool = False
    """Whether the logits of every image are kept, which ensembles are made of."""

    def __post_init__(self) -> None:
        """Raises UsageError if dtype, routing or corruption are unknown."""
        if self.dtype not in DTYPES:
            near = did_you_mean(self.dtype, DTYPES)
            raise UsageError(f"precision: expected one of {', '.join(DTYPES)}, got `{self.dtype}`{near}")
        if self.routing not in ROUTINGS:
            near = did_you_mean(self.routing, ROUTINGS)
            raise UsageError(f"routing: expected one of {', '.join(ROUTINGS)}, got `{self.routing}`{near}")
        if self.corruption is not None:
            from mergecli.data.corruptions import check

            check(*self.corruption)


class Tower(NamedTuple):
    """A vision tower to evaluate."""

    name: str
    label: str
    """What results call its source."""
    checkpoint: Checkpoint
    """The vision tower only, open."""
    pool: str | None = None
    """What a recipe says of it that has it among its models."""
    identity: str = ""
    """What tells it from others before it is merged; empty for one that is told by its content."""


def read_arguments(
    known: Recipe | None,
    engine: Engine,
    *,
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
    features: str | Path | None = None,
    routes: str | Path | None = None,
    logits: bool = False,
) -> tuple[Source, list[Task], Settings]:
    """The CLIP, the tasks and the settings that arguments of `evaluate` mean.

    Raises:
        UsageError: there is no CLIP or no task, or a value is wrong.
    """
    from mergecli.storage.cache import allowed_size

    base = parse_source(str(clip), Path()) if clip is not None else known.base if known else None
    if base is None:
        raise UsageError(
            "there is no CLIP to evaluate with",
            "name it with `--clip`, or a recipe that has a `base` with `--recipe`",
        )
    chosen = tasks_of(tasks, known)
    if batch_size is None:
        batch_size = known.batch_size if known else 128
    settings = Settings(
        batch_size=count("batch_size", batch_size),
        split=split,
        limit=None if limit is None else count("limit", limit),
        corruption=Corruption(corruption, severity) if corruption else None,
        device=engine.device(device),
        dtype=dtype,
        workers=_decoders(engine) if workers is None else count("workers", workers),
        max_size=allowed_size(cache_size) if cache else 0,
        fresh=fresh,
        routing=cast("Routing", routing),
        features=Path(features) if features is not None else None,
        routes=Path(routes) if routes is not None else None,
        logits=logits,
    )
    return base, chosen, settings


def _decoders(engine: Engine) -> int | None:
    """How many processes decode images for each of an engine's units; None if there is one unit at a time."""
    if engine.is_this_process:
        return None
    if engine.cpus_per_unit is not None or engine.name == "ray":
        return engine.cpus_per_unit or 1
    return max(1, (os.cpu_count() or 1) // (engine.jobs or 1))


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
