"""Whole models as dictionaries, and as one long vector."""

from __future__ import annotations

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def floats(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if value.is_floating_point()}


def flat(weights: Weights) -> Tensor:
    return torch.cat([weights[name].reshape(-1) for name in sorted(floats(weights))])


def unflat(vector: Tensor, like: Weights) -> Weights:
    result: Weights = {}
    at = 0
    for name in sorted(floats(like)):
        count = like[name].numel()
        result[name] = vector[at : at + count].reshape(like[name].shape)
        at += count
    return result
