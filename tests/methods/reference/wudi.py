"""WUDI-Merging by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._svd import by_matrix
from tests.methods.reference._weights import Weights


def wudi(base: Weights, tuned: Sequence[Weights], steps: int, learning_rate: float) -> Weights:
    """By autograd and torch's own Adam, in float32."""

    def merge(deltas: Sequence[Tensor]) -> Tensor:
        vectors = torch.stack(list(deltas)).float()
        merged = vectors.sum(0).requires_grad_()
        optimizer = torch.optim.Adam([merged], lr=learning_rate)
        for _ in range(steps):
            loss = sum(((merged - v) @ v.T).square().sum() / v.square().sum() for v in vectors)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
        return merged.detach()

    return by_matrix(base, tuned, merge)
