"""Inner products of whole tensors, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_STEP = 1 << 16


def inner_products(rows: Tensor) -> Tensor:
    """(T, T) float64 inner products of (T, ...) tensors, each taken as one long vector."""
    flat = rows.reshape(len(rows), -1)
    result = flat[:, :0].double() @ flat[:, :0].double().T
    for start in range(0, flat.shape[1], _STEP):
        part = flat[:, start : start + _STEP].double()
        result += part @ part.T
    return result


def cosines(products: Tensor) -> Tensor:
    """(T, T) cosines from inner products; 0 where a vector is 0, and with itself 1 but for
    rounding otherwise."""
    norms = products.diagonal().sqrt()
    inverse = norms.reciprocal().masked_fill_(norms == 0, 0)
    return (products * inverse * inverse[:, None]).clamp_(-1, 1)
