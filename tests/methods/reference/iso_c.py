"""The summed task vector with all singular values equal, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._svd import by_matrix, svd
from tests.methods.reference._weights import Weights


def iso_c(base: Weights, tuned: Sequence[Weights], scaling_factor: float) -> Weights:
    def merge(deltas: Sequence[Tensor]) -> Tensor:
        left, values, right = svd(sum(deltas))  # type: ignore[arg-type]
        return left @ torch.diag(torch.full_like(values, float(values.mean()))) @ right

    return by_matrix(base, tuned, merge, scaling_factor)
