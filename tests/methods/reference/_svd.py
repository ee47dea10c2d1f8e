"""Singular values as papers write them: full decompositions, float64, one matrix after another.

Matrices are the tensors of two dimensions but the position embedding. They have full rank here, so that nothing depends
on which vectors a decomposition returns for singular values that are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.methods.reference._weights import Weights, floats

Matrices = Callable[[Sequence[Tensor]], Tensor]


def by_matrix(
    base: Weights,
    tuned: Sequence[Weights],
    merge: Matrices,
    scaling_factor: float = 1.0,
    *,
    positions: bool = False,
) -> Weights:
    """theta_0 + scaling_factor tau, tau from `merge` for matrices, else the mean of the task vectors.

    `positions`: the position embedding is a matrix too.
    """
    result = {}
    for name, value in floats(base).items():
        deltas = [model[name].double() - value.double() for model in tuned]
        if value.dim() == 2 and value.numel() and (positions or "position" not in name):
            merged = merge(deltas)
        else:
            merged = sum(deltas) / len(deltas)
        result[name] = (value + scaling_factor * merged).float()
    return result


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    left, _, right = svd(matrix)
    return left @ right
