"""ACTMat and TACT with torch's own pseudo-inverse, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._svd import by_matrix
from tests.methods.reference._weights import Weights


def act_mat(base: Weights, tuned: Sequence[Weights], density: float, cutoff: float = 2.0**-23) -> Weights:
    def trimmed(delta: Tensor) -> Tensor:
        kept = max(1, round(density * delta.numel()))
        chosen = delta.abs().flatten().topk(kept).indices
        mask = torch.zeros(delta.numel(), dtype=torch.bool)
        mask[chosen] = True
        return delta * mask.view(delta.shape)

    def merge(deltas: Sequence[Tensor]) -> Tensor:
        grams = [trimmed(delta).T @ trimmed(delta) for delta in deltas]
        left = sum(grams)
        right = sum(delta @ gram for delta, gram in zip(deltas, grams, strict=True))
        return right @ torch.linalg.pinv(left, rtol=cutoff * max(deltas[0].shape), hermitian=True)

    return by_matrix(base, tuned, merge, positions=True)
