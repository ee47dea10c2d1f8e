"""DARE on whole models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._random_numbers import uniform
from tests.methods.reference._weights import Weights, floats


def dare(
    base: Weights, tuned: Sequence[Weights], drop_rate: float, rescale: bool, seed: int = 0
) -> list[Weights]:
    """The thinned models, for another method to merge; tasks are called t1, t2, ..."""
    thinned = []
    for number, model in enumerate(tuned, 1):
        result = dict(model)
        for name, value in floats(base).items():
            kept = uniform(name, f"t{number}", value, seed) >= drop_rate
            delta = torch.where(kept, model[name] - value, 0)
            result[name] = value + (delta / (1 - drop_rate) if rescale else delta)
        thinned.append(result)
    return thinned
