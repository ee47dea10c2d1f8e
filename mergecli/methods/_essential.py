"""The directions of a layer's output in which a task vector matters, on the inputs of the task's own images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergecli.methods._svd import blocks, gram

if TYPE_CHECKING:
    from torch import Tensor

RESOLVED = 1e-10
"""Variances up to this share of the largest are rounding."""


def essential_directions(delta: Tensor, inputs: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(O, k) orthonormal p_j and (k,) l_j, largest first: eigenvectors and eigenvalues of D G D^T, float64.

    They are the right singular vectors of X D^T, X the inputs and G = X^T X up to a factor. k is at most `most`; where l_j is
    rounding, l_j and p_j are 0.

    Args:
        delta: (O, I) D, the task vector of the layer's weight.
        inputs: (I, I) G, the Gram matrix of the layer's inputs.
    """
    import torch

    wide = delta.double()
    if len(wide) <= wide.shape[1]:
        values, vectors = torch.linalg.eigh(congruent(wide, inputs))
        values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
        present = values > RESOLVED * values[:1].clamp(min=0)
        return vectors * present, values * present
    # D G D^T = Y Y^T with Y = D L for any L L^T = G, and Y^T Y is smaller: p = Y v / sqrt l
    outputs = wide @ square_root(inputs.double())
    values, vectors = torch.linalg.eigh(gram(outputs))
    values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
    present = values > RESOLVED * values[:1].clamp(min=0)
    values = values * present
    scales = values.rsqrt().masked_fill(~present, 0)
    return (outputs @ vectors).mul_(scales), values


def square_root(square: Tensor) -> Tensor:
    """(I, I) L with L L^T the symmetric (I, I) float64 matrix, without its negative eigenvalues: Cholesky's factor, or where
    rounding has left some eigenvalue that is not above 0, eigenvectors times roots."""
    import torch

    factor, failed = torch.linalg.cholesky_ex(square)
    if not int(failed):
        return factor
    sizes, vectors = torch.linalg.eigh(square)
    return vectors * sizes.clamp_(min=0).sqrt_()


def congruent(matrix: Tensor, square: Tensor) -> Tensor:
    """(O, O) M G M^T of a float64 (O, I) M and a symmetric (I, I) G, of which only the blocks above the diagonal are multiplied."""
    import torch

    half = matrix.new_zeros(len(matrix), len(matrix))
    for rows in blocks(len(square)):
        upper = square[rows, rows.start :].to(torch.float64, copy=True)
        upper[:, : len(upper)] /= 2
        half.addmm_(matrix[:, rows] @ upper, matrix[:, rows.start :].T)
    return half + half.T
