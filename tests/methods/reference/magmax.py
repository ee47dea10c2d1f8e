"""MagMax, by one argmax over all tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._weights import Weights, floats


def magmax(base: Weights, tuned: Sequence[Weights], scaling_factor: float) -> Weights:
    result = {}
    for name, value in floats(base).items():
        deltas = torch.stack([model[name] - value for model in reversed(tuned)])
        largest = deltas.abs().argmax(0, keepdim=True)
        result[name] = value + scaling_factor * deltas.gather(0, largest)[0]
    return result
