"""E-WEMoE: one router for all layers, and the largest entries of each task vector."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tests.methods.reference._weights import Weights
from tests.methods.reference._wemoe import put_routers


def efficient_weight_ensembling_moe(
    tower: nn.Module, base: Weights, tuned: Sequence[Weights], start: float, routing: str,
    density: float = 0.1, shared_router: bool = True, position_encoding: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Makes the tower one that routes, and gives its routers' parameters by their keys."""
    return put_routers(tower, base, tuned, start, routing, density, shared_router, position_encoding)
