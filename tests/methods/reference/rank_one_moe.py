"""Rank-One-MoE: every matrix of rank one is written down, and added up for one image after another; in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.methods.reference._svd import svd
from tests.methods.reference._weights import Weights
from tests.methods.reference._wemoe import PARTS, VISION, Mlp, normal


class Few(Mlp):
    """An MLP of which the routing weights below the largest are faded out."""

    best = 0

    def one(self, tokens: Tensor, weights: Tensor) -> Tensor:
        if self.best:
            least = weights.sort(descending=True).values[self.best - 1]
            weights = weights * torch.sigmoid(100 * (weights - least))
        return super().one(tokens, weights)


def rank_one_moe(
    tower: nn.Module, base: Weights, tuned: Sequence[Weights], start: float, routing: str, rank: int = 32,
    best_directions: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Makes the tower one that routes, and gives its routers' parameters by their keys."""
    deltas = [{name: model[name].double() - base[name].double() for name in base} for model in tuned]
    state = tower.state_dict()
    for name, value in base.items():
        routed = ".mlp." in name and name.endswith("weight")
        arithmetic = value.double() + start * sum(delta[name] for delta in deltas)
        state[name.removeprefix(VISION)].copy_(value if routed else arithmetic)
    parameters: dict[str, Tensor] = {}
    for number, layer in enumerate(tower.encoder.layers):
        path = f"{VISION}encoder.layers.{number}.mlp"
        vectors: list[Weights] = []
        for delta in deltas:
            found = {part: svd(delta[f"{path}.{part}"]) for part in ("fc1.weight", "fc2.weight")}
            for k in range(min(rank, *delta[f"{path}.fc1.weight"].shape)):
                own = {part: s[k] * torch.outer(u[:, k], vh[k]) for part, (u, s, vh) in found.items()}
                nothing = {part: torch.zeros_like(delta[f"{path}.{part}"]) for part in PARTS}
                vectors.append(nothing | own)
        router = nn.Linear(base[f"{path}.fc1.weight"].shape[1], len(vectors))
        prefix = f"router.{path}.0."
        router.weight.data = 0.01 * normal(f"{prefix}weight", router.weight.data)
        router.bias.data.fill_(start)
        router = router.double()
        parameters |= {f"{prefix}weight": router.weight, f"{prefix}bias": router.bias}
        layer.mlp = Few(layer.mlp, vectors, router, routing)
        layer.mlp.best = best_directions
    return parameters
