"""OPCM with full decompositions, step after step as the paper has it: the merge of the step before is scaled back first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._weights import Weights, floats


def opcm(base: Weights, tuned: Sequence[Weights], alpha: float = 0.5) -> Weights:
    """The last merge of the chain, in float64."""
    start = {name: value.double() for name, value in floats(base).items()}
    merged = {name: tuned[0][name].double() for name in start}
    norms = [norm(merged, start)]
    scale = 1.0
    for model in tuned[1:]:
        norms.append(norm({name: model[name].double() for name in start}, start))
        for name, origin in start.items():
            before, new = merged[name] - origin, model[name].double() - origin
            if origin.dim() == 2 and origin.numel() and "position" not in name:
                new = projected(before, new, alpha)
            merged[name] = origin + scale * before + new
        scale = norm(merged, start) / (sum(norms) / len(norms))
        merged = {name: origin + (merged[name] - origin) / scale for name, origin in start.items()}
    return {name: value.float() for name, value in merged.items()}


def projected(before: Tensor, new: Tensor, alpha: float) -> Tensor:
    """The part of a new task vector that is added to the one before."""
    left, values, right = torch.linalg.svd(before)  # square left and right
    share = values.cumsum(0) / values.sum()
    kept = next(index for index, each in enumerate(share) if each > alpha)
    inner = left.T @ new @ right.T
    for index in range(len(values)):
        inner[index, index] = 0
    inner[:kept, :kept] = 0
    return left @ inner @ right


def norm(weights: Weights, base: Weights) -> float:
    """The Euclidean length of a whole task vector."""
    return float(sum((weights[name] - value).square().sum() for name, value in base.items())) ** 0.5
