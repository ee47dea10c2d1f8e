"""Model Stock, tensor by tensor, from every pair's angle."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from tests.methods.reference._weights import Weights, floats


def model_stock(base: Weights, tuned: Sequence[Weights]) -> Weights:
    result = {}
    for name, value in floats(base).items():
        deltas = [(model[name] - value).double() for model in tuned]
        angles = [
            torch.acos(((a * b).sum() / (a.norm() * b.norm())).nan_to_num(0).clamp(-1, 1))
            for a, b in itertools.combinations(deltas, 2)
        ]
        cosine = torch.cos(torch.stack(angles).mean()).clamp(min=0)
        t = len(tuned) * cosine / (1 + (len(tuned) - 1) * cosine)
        mean = sum(model[name] for model in tuned) / len(tuned)
        result[name] = (t * mean + (1 - t) * value).float()
    return result
