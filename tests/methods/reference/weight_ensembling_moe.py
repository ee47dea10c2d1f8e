"""WEMoE: a router of its own for every layer, and whole task vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tests.methods.reference._weights import Weights
from tests.methods.reference._wemoe import put_routers


def weight_ensembling_moe(
    tower: nn.Module, base: Weights, tuned: Sequence[Weights], start: float, routing: str
) -> dict[str, Tensor]:
    """Makes the tower one that routes, and gives its routers' parameters by their keys."""
    return put_routers(tower, base, tuned, start, routing, density=1.0, shared=False, position=0)
