"""LOT-Merging of whole models, with torch's own pseudo-inverse, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.methods.reference._weights import Weights, floats


def lot(
    base: Weights,
    tuned: Sequence[Weights],
    inputs: Sequence[Mapping[str, Tensor]],
    normalized: Sequence[Mapping[str, Tensor]],
    scaling_factor: float,
) -> Weights:
    """`inputs`: weight -> (rows, I) what goes into it; `normalized`: scale -> (rows, D) what it multiplies."""
    result = {}
    for name, value in floats(base).items():
        deltas = [model[name].double() - value.double() for model in tuned]
        if name in inputs[0]:
            grams = [each[name].T @ each[name] / len(each[name]) for each in inputs]
            wanted = sum(delta @ gram for delta, gram in zip(deltas, grams, strict=True))
            merged = wanted @ torch.linalg.pinv(sum(grams), rtol=len(grams[0]) * 2.0**-23, hermitian=True)
        elif name in normalized[0]:
            weights = [each[name].double().square().mean(0) for each in normalized]
            merged = sum(w * delta for w, delta in zip(weights, deltas, strict=True)) / sum(weights)
        else:
            merged = sum(deltas) / len(deltas)
        result[name] = (value + scaling_factor * merged).float()
    return result
