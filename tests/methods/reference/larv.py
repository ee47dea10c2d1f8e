"""LARV's scales, layer by layer, and task vectors scaled by them; in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.methods.reference._weights import Weights, floats


def effective_rank(matrix: Tensor) -> float:
    shares = torch.linalg.svdvals(matrix).square()
    shares = shares[shares > 0] / shares.sum()
    return math.exp(-float((shares * shares.log()).sum()))


def conflict(base: Tensor, delta: Tensor) -> float:
    outer = (base @ delta.T - delta @ base.T).norm()
    inner = (base.T @ delta - delta.T @ base).norm()
    return float(outer + inner) / 2 / float(base.norm() * delta.norm())


def scales(
    base: Weights, tuned: Sequence[Weights], gate: Callable[[list[float]], list[float]]
) -> list[float]:
    """The scale of each layer, by the gate of all scores."""
    number = {name: re.search(r"layers\.(\d+)\.", name) for name in floats(base)}
    last = max(int(found[1]) for found in number.values() if found)
    rich, conflicts = [], []
    for layer in range(last + 1):
        names = [n for n, found in number.items() if found and int(found[1]) == layer and base[n].dim() == 2]
        pairs = [(base[n].double(), model[n].double() - base[n].double()) for n in names for model in tuned]
        rich.append(sum(effective_rank(b) / effective_rank(d) for b, d in pairs) / len(pairs))
        conflicts.append(sum(conflict(b, d) for b, d in pairs) / len(pairs))
    middle = sum(conflicts) / len(conflicts)
    deviation = math.sqrt(sum((c - middle) ** 2 for c in conflicts) / len(conflicts)) or 1.0
    scores = [
        e * math.sqrt((layer + 1) / (last + 1)) / (1 + math.log1p(math.exp((c - middle) / deviation)))
        for layer, (e, c) in enumerate(zip(rich, conflicts, strict=True))
    ]
    return gate(scores)


def tiers(scores: list[float]) -> list[float]:
    """Thirds of the layers, from the lowest score."""
    order = sorted(scores)
    return [(0.5, 1.0, 1.2)[order.index(score) * 3 // len(scores)] for score in scores]


def tanh(scores: list[float]) -> list[float]:
    return [1 + 0.5 * math.tanh(3 * (score - 1)) for score in scores]


def larv(
    base: Weights, tuned: Sequence[Weights], gate: Callable[[list[float]], list[float]]
) -> list[Weights]:
    """The models with scaled task vectors, for any method to merge."""
    found = scales(base, tuned, gate)

    def scale(name: str) -> float:
        layer = re.search(r"layers\.(\d+)\.", name)
        return found[int(layer[1])] if layer else found[-1] if "post" in name else found[0]

    return [
        {name: value + scale(name) * (model[name] - value) for name, value in floats(base).items()}
        for model in tuned
    ]
