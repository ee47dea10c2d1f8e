"""PCB-Merging on whole task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._weights import Weights, flat, unflat


def pcb(base: Weights, tuned: Sequence[Weights], scaling_factor: float, density: float) -> Weights:
    """Du et al., as their program computes it, on whole task vectors."""
    deltas = torch.stack([flat(model) - flat(base) for model in tuned])  # (T, D)
    count, entries = deltas.shape
    ordered = deltas.abs().sort(dim=1).values
    low = ordered[:, int(entries * 0.0001)].unsqueeze(1)
    high = ordered[:, int(entries * (1 - 0.0001) - 1)].unsqueeze(1)
    magnitude = deltas.abs().clamp(low, high)
    intra = torch.exp(count * ((magnitude - low) / (high - low)) ** 2)
    inter = torch.tanh(deltas * deltas.sum(0))
    score = intra * inter
    ranked = score.sort(dim=1).values
    least = ranked[:, int(entries * (1 - density))].unsqueeze(1)
    weight = (score.clamp(min=least) - least) / (ranked[:, -1:] - least)
    merged = (magnitude * deltas.sign() * weight).sum(0) / weight.sum(0).clamp(min=1e-12)
    return unflat(flat(base) + scaling_factor * merged, base)
