"""Task singular vectors, compressed: every task's tower as a whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._weights import Weights, floats


def tsv_c(base: Weights, tuned: Sequence[Weights], rank_fraction: float | None) -> list[Weights]:
    """Gargiulo et al.: every task's tower, from full decompositions in float64."""
    towers = []
    for model in tuned:
        tower = {}
        for name, value in floats(base).items():
            delta = (model[name] - value).double()
            if value.dim() == 2 and value.numel() and "position" not in name:
                smaller = min(value.shape)
                k = smaller // len(tuned) if rank_fraction is None else round(rank_fraction * smaller)
                k = max(1, k)
                if k * sum(value.shape) < value.numel():
                    left, values, right = torch.linalg.svd(delta, full_matrices=False)
                    delta = sum(values[j] * torch.outer(left[:, j], right[j]) for j in range(k))  # type: ignore[assignment]
            tower[name] = (value + delta).float()
        towers.append(tower)
    return towers
