"""Towers of weight-ensembling mixtures as they are defined: one image after another, every weight added up anew, plain
autograd and torch's own Adam; in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tests.methods.reference._random_numbers import uniform
from tests.methods.reference._weights import Weights

VISION = "vision_model."
PARTS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


class Mlp(nn.Module):
    """One layer's MLP, with the weights of every image by themselves or of all images together."""

    def __init__(self, mlp: nn.Module, vectors: Sequence[Weights], router: nn.Module, routing: str) -> None:
        super().__init__()
        self.base = {part: mlp.get_parameter(part).detach() for part in PARTS}
        self.activation, self.vectors = mlp.activation_fn, vectors
        self.router, self.routing = router, routing

    def forward(self, hidden: Tensor) -> Tensor:
        each = torch.stack([self.router(tokens).mean(0) for tokens in hidden])
        if self.routing == "batch":
            each = each.mean(0, keepdim=True).expand_as(each)
        return torch.stack([self.one(tokens, own) for tokens, own in zip(hidden, each, strict=True)])

    def one(self, tokens: Tensor, weights: Tensor) -> Tensor:
        mixed = {
            part: value + sum(w * vector[part] for w, vector in zip(weights, self.vectors, strict=True))
            for part, value in self.base.items()
        }
        inner = self.activation(linear(tokens, mixed["fc1.weight"], mixed["fc1.bias"]))
        return linear(inner, mixed["fc2.weight"], mixed["fc2.bias"])


class Placed(nn.Module):
    """A router that is told its layer."""

    def __init__(self, router: nn.Module, place: int, size: int) -> None:
        super().__init__()
        self.router = router
        rate = [10000 ** (2 * (n // 2) / max(size, 1)) for n in range(size)]
        self.place = torch.tensor([(math.cos if n % 2 else math.sin)(place / r) for n, r in enumerate(rate)])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.router(torch.cat([self.place.to(tokens).expand(len(tokens), -1), tokens], 1))


def normal(key: str, like: Tensor) -> Tensor:
    """Box and Muller."""
    radius = torch.sqrt(-2 * torch.log1p(-uniform(key, "radius", like)))
    return radius * torch.cos(2 * math.pi * uniform(key, "angle", like))


def pruned(vector: Tensor, density: float) -> Tensor:
    if density >= 1:
        return vector
    return torch.where(vector.abs() > torch.quantile(vector.abs(), 1 - density), vector, 0)


def put_routers(
    tower: nn.Module, base: Weights, tuned: Sequence[Weights], start: float, routing: str,
    density: float, shared: bool, position: int,
) -> dict[str, Tensor]:  # fmt: skip
    """Makes the tower one that routes, and gives its routers' parameters by their keys: of the task vectors the largest
    `density` of each tensor, one router for all layers if it is `shared`, told its layer by `position` numbers."""
    deltas = [{name: model[name] - base[name] for name in base} for model in tuned]
    state = tower.state_dict()
    for name, value in base.items():
        total = sum(delta[name] for delta in deltas)
        state[name.removeprefix(VISION)].copy_(value if ".mlp." in name else value + start * total)
    parameters: dict[str, Tensor] = {}
    router: nn.Module | None = None
    for number, layer in enumerate(tower.encoder.layers):
        path = f"{VISION}encoder.layers.{number}.mlp"
        if router is None or not shared:
            width = base[f"{path}.fc1.weight"].shape[1] + position
            first, last = nn.Linear(width, width), nn.Linear(width, len(tuned))
            prefix = "router.shared." if shared else f"router.{path}."
            for key, part in (("0", first), ("1", last)):
                part.weight.data = 0.01 * normal(f"{prefix}{key}.weight", part.weight.data)
                part.bias.data.fill_(start if key == "1" else 0)
            router = nn.Sequential(first, nn.ReLU(), last).double()
            for key, part in (("0", first), ("1", last)):
                parameters |= {f"{prefix}{key}.weight": part.weight, f"{prefix}{key}.bias": part.bias}
        vectors = [
            {part: pruned(delta[f"{path}.{part}"], density).double() for part in PARTS} for delta in deltas
        ]
        layer.mlp = Mlp(layer.mlp, vectors, Placed(router, number, position) if position else router, routing)
    return parameters


def learn(
    logits: Callable[[Tensor, int], Tensor], batches: Callable[[int], list[tuple[int, Tensor]]],
    parameters: dict[str, Tensor], steps: int, rate: float,
) -> list[list[float]]:  # fmt: skip
    """Changes the parameters by so many steps of Adam on the sum of the entropies; gives the entropies of each."""
    optimizer = torch.optim.Adam(parameters.values(), lr=rate)
    trace: list[list[float]] = []
    for draw in range(steps):
        each: list[Tensor] = []
        for place, pixels in batches(draw):
            chances = logits(pixels, place).softmax(-1)
            each.append((-chances * torch.log(chances + 1e-8)).sum(-1).mean())
        optimizer.zero_grad()
        torch.stack(each).sum().backward()
        optimizer.step()
        trace.append(torch.stack(each).tolist())
    return trace
