"""Concrete task arithmetic: autograd through mask and merge, and torch's own Adam; in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._adamerging_loop import Found, Sight, deltas_of, weighted
from tests.methods.reference._concrete_masks import kept, sampled, zeros
from tests.methods.reference._weights import Weights


def concrete_task_arithmetic(
    sight: Sight, base: Weights, tuned: Sequence[Weights], *, steps: int, learning_rate: float,
    scaling_factor: float = 0.3, temperature: float = 0.5, initial_logits: float = 0.0, mask: str = "sample",
) -> Found:  # fmt: skip
    deltas, logits = deltas_of(base, tuned), zeros(base, initial_logits)
    c = torch.full((len(tuned), 1), scaling_factor, dtype=torch.float64)
    optimizer = torch.optim.Adam(logits.values(), lr=learning_rate)
    entropies: list[list[float]] = []
    for step in range(steps):
        masks = sampled(logits, f"step {step}", temperature)
        loss, each = sight.loss(weighted(base, deltas, c, masks), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        entropies.append(each)
    with torch.no_grad():
        return Found(weighted(base, deltas, c, kept(logits, temperature, mask)), c, logits, entropies)
