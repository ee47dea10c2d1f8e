"""Singular value decompositions and polar factors through Gram matrices in float64, and which tensors are matrices."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from mergecli.methods._base import Group

if TYPE_CHECKING:
    from torch import Tensor

PositionEmbedding = Literal["table", "matrix"]

NEGLIGIBLE = 1e-6
"""Singular values up to this share of the largest count as 0: in float32 weights they are rounding errors."""

_POSITIONS = re.compile(r"(^|[._])pos(ition(al)?)?_embed(ding)?s?(\.weight)?$")


def is_matrix(group: Group, position_embedding: PositionEmbedding) -> bool:
    """Whether the tensor is a linear map: it has two dimensions and is not a table of positions counted as such."""
    if len(group.shape) != 2:
        return False
    return position_embedding == "matrix" or not _POSITIONS.search(group.name)


def decompose(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(O, k), (k,) and (I, k) left vectors, singular values and right vectors of a (O, I) matrix, largest first.

    k is `rank`, or the smaller side. Negligible singular values are 0, and so are their vectors.

    Why this way: the eigenvalues of the smaller Gram matrix in float64 give the float32 matrix's singular values to
    about 1e-10 of the largest, more closely than a full float32 decomposition and in a third of its time.
    """
    import torch

    tall = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T
    squares, vectors = torch.linalg.eigh(gram(tall))
    k = min(len(squares), len(squares) if rank is None else rank)
    values = squares.flip(0)[:k].clamp_(min=0).sqrt_()
    values = values.masked_fill_(values <= NEGLIGIBLE * values[:1], 0)
    inner = vectors.flip(1)[:, :k] * (values > 0)
    outer = (tall @ inner).mul_(_inverse(values))
    left, right = (outer, inner) if matrix.shape[0] >= matrix.shape[1] else (inner, outer)
    return left, values, right


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) and (k,): U V^T of the decomposition U S V^T of a (O, I) matrix, and S, smallest first, in float64.

    Directions of negligible singular values are left out: U V^T then is 0 on them, so that it is always defined.
    """
    import torch

    tall = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T
    squares, vectors = torch.linalg.eigh(gram(tall))
    values = squares.clamp_(min=0).sqrt_()
    values = values.masked_fill_(values <= NEGLIGIBLE * values[-1:], 0)
    factor = tall @ ((vectors * _inverse(values)) @ vectors.T)
    return (factor if matrix.shape[0] >= matrix.shape[1] else factor.T), values


def gram(matrix: Tensor) -> Tensor:
    """(I, I) matrix^T matrix of a (O, I) matrix; of the two equal halves only one is computed."""
    import torch

    size = matrix.shape[1]
    result = torch.empty(size, size, dtype=matrix.dtype, device=matrix.device)
    step = max(64, -(-size // 4))
    for start in range(0, size, step):
        stop = min(start + step, size)
        torch.mm(matrix[:, start:stop].T, matrix[:, start:], out=result[start:stop, start:])
        result[stop:, start:stop] = result[start:stop, stop:].T
    return result


def _inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 where they are 0."""
    return values.reciprocal().masked_fill_(values == 0, 0)
