"""What a result says of the tower that was evaluated, besides its scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from mergecli.formats.mixture import mixture_of
from mergecli.formats.quantized import quantized_models
from mergecli.storage.checkpoint import PROJECTION
from mergecli.storage.metadata import looked_at, made_of, pool_in

if TYPE_CHECKING:
    from mergecli.evaluation.settings import Settings, Tower
    from mergecli.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class TowerFacts:
    """What is known of a tower once it is open; kept with its counts, since a point of a sweep is merged only to be counted."""

    checkpoint: Mapping[str, str | None]
    """As `Evaluation.checkpoint`."""
    parameters: int
    bytes: int
    models: Mapping[str, str] = field(default_factory=dict[str, str])
    looked_at: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    pool: str | None = None
    """What the recipe says of the models."""
    has_projection: bool = False
    """Whether a visual projection of its own is part of it."""

    @classmethod
    def of(cls, tower: Tower, base_digest: str, settings: Settings) -> Self:
        """Of an open tower; `base_digest` is that of the CLIP's own."""
        checkpoint = tower.checkpoint
        metadata = checkpoint.metadata
        return cls(
            checkpoint=_checkpoint_facts(tower, base_digest, settings),
            parameters=_parameters(checkpoint),
            bytes=checkpoint.nbytes,
            models=made_of(metadata)[1],
            looked_at=looked_at(metadata),
            pool=pool_in(metadata) or tower.pool,
            has_projection=PROJECTION in checkpoint.entries,
        )

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises TypeError if they are no facts."""
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """What `of_json` takes."""
        may_lack = {"pool": None, "has_projection": False}
        return {
            key: value for key, value in asdict(self).items() if key not in may_lack or value != may_lack[key]
        }


def _checkpoint_facts(tower: Tower, base_digest: str, settings: Settings) -> dict[str, str | None]:
    """What `Evaluation.checkpoint` says of it; None where the file does not say."""
    digest, metadata = tower.checkpoint.digest(), tower.checkpoint.metadata
    method = metadata.get("method") or ("pretrained" if digest == base_digest else None)
    kind = metadata.get("kind", "checkpoint")
    found = {"name": tower.name, "path": tower.label, "digest": digest, "kind": kind, "method": method}
    if tower.checkpoint.is_mixture:
        mixture = mixture_of(tower.checkpoint)
        found["routing"] = mixture.router or mixture.routing(settings.routing) or "task"
        if mixture.has_heads:
            found["heads"] = "learned"
    if quantized := quantized_models(metadata):
        found["quantized"] = quantized
    return found | made_of(metadata)[0]


def _parameters(checkpoint: Checkpoint) -> int:
    """Entries of all tensors; in a mixture only of those in floating point, since masks are no parameters."""
    counts = [
        entry.size for entry in checkpoint.entries.values() if entry.is_float or not checkpoint.is_mixture
    ]
    return sum(counts)
