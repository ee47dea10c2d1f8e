"""Model breadcrumbs, by sorting each tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._weights import Weights, floats


def breadcrumbs(
    base: Weights, tuned: Sequence[Weights], scaling_factor: float, drop_smallest: float, drop_largest: float
) -> Weights:
    """Davari and Belilovsky: by rank, for entries none of which tie."""
    result = {}
    for name, value in floats(base).items():
        merged = torch.zeros_like(value)
        for model in tuned:
            delta = (model[name] - value).reshape(-1)
            order = delta.abs().argsort()
            below, above = int(drop_smallest * len(delta)), int(drop_largest * len(delta))
            kept = torch.zeros_like(delta)
            middle = order[below : len(delta) - above]
            kept[middle] = delta[middle]
            merged = merged + kept.reshape(value.shape)
        result[name] = value + scaling_factor * merged
    return result
