"""Singular value decompositions and polar factors through Gram matrices in float64, and which tensors are matrices."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    return is_matrix_named(group.name, tuple(group.shape), position_embedding)


def is_matrix_named(name: str, shape: tuple[int, ...], position_embedding: PositionEmbedding) -> bool:
    """The same of a tensor's name and shape."""
    return len(shape) == 2 and (position_embedding == "matrix" or not _POSITIONS.search(name))


def decompose(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(O, k), (k,) and (I, k) left vectors, singular values and right vectors of a (O, I) matrix, largest first.

    k is `rank`, or the smaller side. Negligible singular values are 0, and so are their vectors.

    Why this way: the eigenvalues of the smaller Gram matrix in float64 give the float32 matrix's singular values to
    about 1e-10 of the largest, more closely than a full float32 decomposition and in a third of its time.
    """
    tall = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T
    values, inner = right_vectors(tall, rank)
    outer = (tall @ inner).mul_(inverse(values))
    left, right = (outer, inner) if matrix.shape[0] >= matrix.shape[1] else (inner, outer)
    return left, values, right


def right_vectors(tall: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """(k,) and (I, k) singular values and right vectors of a float64 (O, I) matrix with O >= I, as of `decompose`. The left
    vectors are the matrix times the right ones, each divided by its singular value."""
    import torch

    squares, vectors = torch.linalg.eigh(gram(tall))
    k = min(len(squares), len(squares) if rank is None else rank)
    values = squares.flip(0)[:k].clamp_(min=0).sqrt_()
    values = values.masked_fill_(values <= NEGLIGIBLE * values[:1], 0)
    return values, vectors.flip(1)[:, :k] * (values > 0)


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) and (k,): U V^T of the decomposition U S V^T of a (O, I) matrix, and S, smallest first, in float64.

    Directions of negligible singular values are left out: U V^T then is 0 on them, so that it is always defined.
    """
    tall = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T
    root, values = _inverse_root(tall)
    factor = tall @ root
    return (factor if matrix.shape[0] >= matrix.shape[1] else factor.T), values


def polar_times(matrix: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(O, K) and (k,): P(X) Y of a (O, I) X and a (I, K) Y, P as of `polar`, and the singular values, smallest first, in float64.

    Where Y has few columns it costs two of the products of P itself.
    """
    import torch

    wide, across = matrix.double(), len(matrix) < matrix.shape[1]
    squares, vectors = torch.linalg.eigh(gram(wide.T if across else wide))
    values = _unnegligible(squares)
    shown = vectors.T @ (wide @ other if across else other.double())
    turned = vectors @ shown.mul_(inverse(values)[:, None])
    return (turned if across else wide @ turned), values


def inverse_root(matrix: Tensor) -> Tensor:
    """(I, I) float64 (X^T X)^(-1/2) of a (O, I) matrix X, 0 in its negligible directions: X times it is `polar(X)[0]`."""
    return _inverse_root(matrix.double())[0]


def _inverse_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a float64 matrix, and its singular values, smallest first."""
    import torch

    squares, vectors = torch.linalg.eigh(gram(matrix))
    values = _unnegligible(squares)
    return (vectors * inverse(values)) @ vectors.T, values


def _unnegligible(squares: Tensor) -> Tensor:
    """(k,) singular values of their squares, smallest first, which are overwritten; negligible ones are 0."""
    values = squares.clamp_(min=0).sqrt_()
    return values.masked_fill_(values <= NEGLIGIBLE * values[-1:], 0)


def gram(matrix: Tensor) -> Tensor:
    """(I, I) matrix^T matrix of a (O, I) matrix; of the two equal halves only one is computed."""
    import torch

    size = matrix.shape[1]
    result = torch.empty(size, size, dtype=matrix.dtype, device=matrix.device)
    for rows in blocks(size):
        torch.mm(matrix[:, rows].T, matrix[:, rows.start :], out=result[rows, rows.start :])
        result[rows.stop :, rows] = result[rows, rows.stop :].T
    return result


def blocks(size: int) -> Iterator[slice]:
    """Rows of a symmetric matrix that are computed together, from the diagonal on."""
    step = max(64, -(-size // 4))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def inverse(values: Tensor) -> Tensor:
    """(...) 1 / values, and 0 where they are 0."""
    return values.reciprocal().masked_fill_(values == 0, 0)
