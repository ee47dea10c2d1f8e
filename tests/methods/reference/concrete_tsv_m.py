"""Concrete TSV-M: autograd through the mask over what TSV-M gives, and torch's own AdamW; in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._adamerging_loop import Found, Sight, weighted
from tests.methods.reference._concrete_masks import kept, sampled, zeros
from tests.methods.reference._weights import Weights
from tests.methods.reference.tsv_m import tsv_m


def concrete_tsv_m(
    sight: Sight, base: Weights, tuned: Sequence[Weights], *, steps: int, learning_rate: float,
    scaling_factor: float = 1.0, temperature: float = 0.5, mask: str = "sample", weight_decay: float = 0.01,
) -> Found:  # fmt: skip
    plain = tsv_m(base, tuned, 1.0)
    merged, logits = [{name: plain[name].double() - base[name].double() for name in base}], zeros(base, 0.0)
    c = torch.full((1, 1), scaling_factor, dtype=torch.float64)
    optimizer = torch.optim.AdamW(logits.values(), lr=learning_rate, weight_decay=weight_decay)
    entropies: list[list[float]] = []
    for step in range(steps):
        masks = sampled(logits, f"step {step}", temperature)
        loss, each = sight.loss(weighted(base, merged, c, masks), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        entropies.append(each)
    with torch.no_grad():
        return Found(weighted(base, merged, c, kept(logits, temperature, mask)), c, logits, entropies)
