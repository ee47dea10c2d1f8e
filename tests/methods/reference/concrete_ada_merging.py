"""Concrete AdaMerging: autograd through mask and merge, and torch's own Adam; in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._adamerging_loop import Found, Sight, deltas_of, started, weighted
from tests.methods.reference._concrete_masks import kept, sampled, zeros
from tests.methods.reference._weights import Weights


def concrete_ada_merging(
    sight: Sight, base: Weights, tuned: Sequence[Weights], *, mask_steps: int, steps: int,
    learning_rate: float, mask_rate: float, inner_rate: float = 1.0, start: float = 0.3, temperature: float = 0.5,
    granularity: str = "layer", mask: str = "sample", order: str = "corrected",
) -> Found:  # fmt: skip
    deltas, logits = deltas_of(base, tuned), zeros(base, 0.0)
    c = started(base, len(tuned), granularity, start)
    inner = torch.optim.Adam([c], lr=inner_rate)
    outer = torch.optim.Adam(logits.values(), lr=mask_rate)
    entropies: list[list[float]] = []
    for step in range(mask_steps):
        masks = sampled(logits, f"step {step}", temperature)
        fixed = {name: each.detach() for name, each in masks.items()}
        if order == "corrected":
            c.data.fill_(start)
            (slope,) = torch.autograd.grad(sight.loss(weighted(base, deltas, c, fixed), 2 * step)[0], c)
            c.data -= inner_rate * slope
        else:
            merged = weighted(base, deltas, c, fixed)
            c.data.fill_(start)
            c.grad = torch.autograd.grad(sight.loss(merged, 2 * step)[0], c)[0]
            inner.step()
        loss, each = sight.loss(weighted(base, deltas, c.detach(), masks), 2 * step + 1)
        outer.zero_grad()
        loss.backward()
        outer.step()
        entropies.append(each)
    with torch.no_grad():
        final = kept(logits, temperature, mask)
    c = started(base, len(tuned), granularity, start)
    optimizer = torch.optim.Adam([c], lr=learning_rate)
    for step in range(steps):
        loss, each = sight.loss(weighted(base, deltas, c, final), 2 * mask_steps + step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        entropies.append(each)
    with torch.no_grad():
        return Found(weighted(base, deltas, c, final), c.detach(), logits, entropies)
