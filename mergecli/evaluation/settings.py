"""How an evaluation computes, the tower it is about, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergecli.data.decoding import Corruption
from mergecli.methods._mixture import Routing
from mergecli.results.result import TaskScore
from mergecli.runtime.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from mergecli.clip.heads import ClipDigests
    from mergecli.evaluation.routes import Routes
    from mergecli.storage.checkpoint import Checkpoint

ROUTINGS = ("sample", "batch")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """How to evaluate."""

    batch_size: int = 128
    split: str | None = None
    """Another split than each task's own."""
    limit: int | None = None
    """At most so many images of each task, about as many of each class."""
    corruption: Corruption | None = None
    device: str = "cpu"
    dtype: str = "float32"
    """Of the tower's weights and of what it computes; heads and logits are float32 always."""
    workers: int | None = None
    max_size: int = 0
    """Bytes that the cache may grow to; 0 does without it."""
    fresh: bool = False
    """Whether what an interrupted evaluation has counted is counted again."""
    routing: Routing = "sample"
    """How towers that route do so: for each image by itself, or for all images of a batch as one."""
    features: Path | None = None
    """The folder that gets the features of every layer."""
    routes: Path | None = None
    """The folder that gets the routes of towers that route."""

    def __post_init__(self) -> None:
        """Raises UsageError if there is no such dtype or corruption, or a number is none."""
        if self.dtype not in DTYPES:
            near = did_you_mean(self.dtype, DTYPES)
            raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, got `{self.dtype}`{near}")
        if self.routing not in ROUTINGS:
            near = did_you_mean(self.routing, ROUTINGS)
            raise UsageError(f"routing: expected one of {', '.join(ROUTINGS)}, got `{self.routing}`{near}")
        for name in ("batch_size", "limit", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}: expected a whole number of at least 1, got {value}")
        if self.corruption is not None:
            from mergecli.data.corruptions import check

            check(*self.corruption)


class Tower(NamedTuple):
    """A vision tower to evaluate."""

    name: str
    label: str
    """What results call the place it comes from."""
    checkpoint: Checkpoint
    """The vision tower only, open."""


@dataclass
class Scores:
    """What the towers came to."""

    tasks: list[dict[str, TaskScore]]
    """For each tower, task -> score."""
    predictions: dict[str, list[object]]
    """Columns with a row for each tower, task and image, if they are wanted."""
    clip: ClipDigests
    processing: str
    """Digest of the image processor's settings."""
    routes: list[Routes]
    """Of the towers that route, if they are wanted."""
    unfinished: list[Path] = field(default_factory=list[Path])
    """Files of the cache that are of no more use once the results are written."""
