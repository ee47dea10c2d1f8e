"""DC-Merge, one step after another, with full decompositions in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._svd import by_matrix, nearest_orthogonal, svd
from tests.methods.reference._weights import Weights


def dc_matrix(deltas: Sequence[Tensor], density: float, rank: int = 0, smooth: float | None = None) -> Tensor:
    size = min(deltas[0].shape)
    k = rank or max(1, size // len(deltas))
    parts = []
    for delta in deltas:
        left, values, right = (part.clone() for part in svd(delta))
        kept = values[:k]
        if smooth is not None:
            steep = min(smooth, float(kept[0] / kept[-1]))
            weights = torch.tensor(
                [steep + (1 - steep) * i / max(1, len(kept) - 1) for i in range(len(kept))]
            )
            kept = kept.sum() * weights.double() / weights.double().sum()
        parts.append((left[:, :k], kept, right[:k]))
    left = nearest_orthogonal(torch.cat([u for u, _, _ in parts], dim=1))
    right = nearest_orthogonal(torch.cat([v for _, _, v in parts]))
    cores = []
    for u, s, v in parts:
        core = left.T @ (u @ s.diag() @ v) @ right.T
        count = min(core.numel(), max(1, int(density * size * size)))
        core[core.abs() < core.abs().flatten().topk(count).values[-1]] = 0
        cores.append(core)
    merged = torch.zeros_like(cores[0])
    sign = sum(cores).sign()
    for row in range(len(merged)):
        for column in range(len(merged)):
            agreeing = [
                core[row, column] for core in cores if core[row, column].sign() == sign[row, column] != 0
            ]
            if agreeing and row // k == column // k:
                merged[row, column] = sum(agreeing) / len(agreeing)
    return left @ merged @ right


def dc_merge(base: Weights, tuned: Sequence[Weights], scaling_factor: float, density: float) -> Weights:
    return by_matrix(base, tuned, lambda deltas: dc_matrix(deltas, density), scaling_factor, positions=True)
