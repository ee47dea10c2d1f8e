"""WUDI-Merging by autograd."""

from __future__ import annotations

import math
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


def exact_wudi(base: Weights, tuned: Sequence[Weights], ridge: float) -> Weights:
    """The minimum of the loss with a ridge, by an inverse, in float64."""

    def merge(deltas: Sequence[Tensor]) -> Tensor:
        weights = [1 / delta.square().sum() for delta in deltas]
        left = sum(w * d.T @ d for w, d in zip(weights, deltas, strict=True))
        right = sum(w * d @ d.T @ d for w, d in zip(weights, deltas, strict=True))
        return right @ torch.linalg.inv(left + ridge * torch.eye(len(left)))  # type: ignore[arg-type]

    return by_matrix(base, tuned, merge)


def swudi(base: Weights, tuned: Sequence[Weights], rank: int, time: float) -> Weights:
    """Gradient descent's flow for that long, direction by direction, of the `rank` largest (0: as the spectrum says)."""

    def merge(deltas: Sequence[Tensor]) -> Tensor:
        weights = [1 / delta.square().sum() for delta in deltas]
        left = sum(w * d.T @ d for w, d in zip(weights, deltas, strict=True))
        right = sum(w * d @ d.T @ d for w, d in zip(weights, deltas, strict=True))
        merged = start = torch.stack(list(deltas)).sum(0)
        values, vectors = torch.linalg.eigh(left)
        roots = values.clamp(min=0).sqrt()
        count = rank or max(1, round(float(roots.sum() ** 2 / roots.square().sum())))
        for k in range(1, min(count, len(values)) + 1):
            value, vector = values[-k], vectors[:, -k]
            share = 1 - math.exp(-time * value) if time else 1.0
            if value > 1e-12:
                merged = merged + torch.outer((right - start @ left) @ vector, vector) * share / value
        return merged

    return by_matrix(base, tuned, merge)
