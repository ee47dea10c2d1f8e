"""AdaMerging: autograd through the merge, and torch's own Adam; in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._adamerging_loop import Found, Sight, deltas_of, started, weighted
from tests.methods.reference._weights import Weights, flat, unflat


def ada_merging(
    sight: Sight, base: Weights, tuned: Sequence[Weights], *, steps: int, learning_rate: float, start: float = 0.3,
    granularity: str = "layer", clamp: bool = False, density: float | None = None,
) -> Found:  # fmt: skip
    deltas = deltas_of(base, tuned) if density is None else ties_kept(base, tuned, density)
    c = started(base, len(tuned), granularity, start)

    def merged() -> Weights:
        return weighted(base, deltas, c.clamp(0, 1) if clamp else c)

    optimizer = torch.optim.Adam([c], lr=learning_rate)
    entropies: list[list[float]] = []
    for step in range(steps):
        loss, each = sight.loss(merged(), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        entropies.append(each)
    with torch.no_grad():
        return Found(merged(), c.clamp(0, 1) if clamp else c.detach(), {}, entropies)


def ties_kept(base: Weights, tuned: Sequence[Weights], density: float) -> list[Weights]:
    """The entries of each task vector that TIES keeps and whose sign is the elected one."""
    vectors = torch.stack([flat(model) - flat(base) for model in tuned])
    kept = int(vectors.shape[1] * density)
    least = vectors.abs().sort(1, descending=True).values[:, kept - 1 : kept]
    trimmed = torch.where(vectors.abs() >= least, vectors, 0)
    agreeing = torch.where(trimmed * trimmed.sum(0).sign() > 0, trimmed, 0)
    return [unflat(row.double(), base) for row in agreeing]
