"""Common and task-specific directions with one singular value, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._svd import by_matrix, nearest_orthogonal, svd
from tests.methods.reference._weights import Weights


def iso_cts(base: Weights, tuned: Sequence[Weights], scaling_factor: float, common_space: float) -> Weights:
    def merge(deltas: Sequence[Tensor]) -> Tensor:
        size, tasks = min(deltas[0].shape), len(deltas)
        own = round((size - int(size * common_space)) / tasks)
        common = size - own * tasks
        left, values, right = (part for part in svd(sum(deltas)))  # type: ignore[arg-type]
        left, values, right = left[:, :common], values[:common], right[:common]
        parts = [svd(delta - left @ left.T @ delta) for delta in deltas]
        all_left = torch.cat([*(u[:, :own] for u, _, _ in parts), left], dim=1)
        all_right = torch.cat([*(v[:own] for _, _, v in parts), right])
        mean = torch.cat([*(s[:own] for _, s, _ in parts), values]).mean()
        return (
            nearest_orthogonal(all_left)
            @ (mean * torch.eye(size, dtype=mean.dtype))
            @ nearest_orthogonal(all_right)
        )

    return by_matrix(base, tuned, merge, scaling_factor)
