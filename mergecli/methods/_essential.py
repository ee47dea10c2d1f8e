"""The directions of a layer's output in which a task vector matters, on the inputs of the task's own images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergecli.methods._svd import gram

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

    wide, squares = delta.double(), inputs.double()
    if len(wide) <= wide.shape[1]:
        values, vectors = torch.linalg.eigh((wide @ squares).mm(wide.T))
        values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
        present = values > RESOLVED * values[:1].clamp(min=0)
        return vectors * present, values * present
    # D G D^T has the eigenvalues of G^1/2 D^T D G^1/2, which is smaller: Y = D Q g^1/2, p = Y v / sqrt l
    sizes, turned = torch.linalg.eigh(squares)
    outputs = wide @ (turned * sizes.clamp_(min=0).sqrt_())
    values, vectors = torch.linalg.eigh(gram(outputs))
    values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
    present = values > RESOLVED * values[:1].clamp(min=0)
    values = values * present
    scales = values.rsqrt().masked_fill(~present, 0)
    return (outputs @ vectors).mul_(scales), values
