"""How an evaluation computes, the tower it is about, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mergecli.data.decoding import Corruption
from mergecli.methods._mixture import Routing
from mergecli.runtime.errors import UsageError, did_you_mean

if TYPE_CHECKING:
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
        """Raises UsageError if dtype, routing or corruption are unknown, or a number is below 1."""
        if self.dtype not in DTYPES:
            near = did_you_mean(self.dtype, DTYPES)
            raise UsageError(f"precision: expected one of {', '.join(DTYPES)}, got `{self.dtype}`{near}")
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
    """What results call its source."""
    checkpoint: Checkpoint
    """The vision tower only, open."""
    pool: str | None = None
    """What a recipe says of it that has it among its models."""
    identity: str = ""
    """What tells it from others before it is merged; empty for one that is told by its content."""
