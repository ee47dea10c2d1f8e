"""Task singular vectors, merged: full decompositions in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._svd import by_matrix, nearest_orthogonal, svd
from tests.methods.reference._weights import Weights


def tsv_m(base: Weights, tuned: Sequence[Weights], scaling_factor: float) -> Weights:
    def merge(deltas: Sequence[Tensor]) -> Tensor:
        k = max(1, min(deltas[0].shape) // len(deltas))
        parts = [svd(delta) for delta in deltas]
        left = nearest_orthogonal(torch.cat([u[:, :k] for u, _, _ in parts], dim=1))
        right = nearest_orthogonal(torch.cat([v[:k] for _, _, v in parts]))
        return left @ torch.diag(torch.cat([s[:k] for _, s, _ in parts])) @ right

    return by_matrix(base, tuned, merge, scaling_factor)
