"""The great circle between two models, tensor by tensor, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._weights import Weights, floats


def slerp(tuned: Sequence[Weights], t: float) -> Weights:
    first, second = tuned
    result = {}
    for name in floats(first):
        a, b = first[name].double(), second[name].double()
        cosine = float((a * b).sum() / (a.norm() * b.norm()))
        if not abs(cosine) <= 0.9995:
            result[name] = (1 - t) * a + t * b
        else:
            angle = torch.tensor(cosine, dtype=torch.float64).acos()
            result[name] = (
                torch.sin((1 - t) * angle) / torch.sin(angle) * a
                + torch.sin(t * angle) / torch.sin(angle) * b
            )
    return {name: value.float() for name, value in result.items()}
