"""The weighted sum of whole models."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._weights import Weights, floats


def weighted_average(tuned: Sequence[Weights], weights: Sequence[float], normalize: bool) -> Weights:
    scale = sum(weights) if normalize else 1
    return {
        name: torch.stack([model[name] * (w / scale) for model, w in zip(tuned, weights, strict=True)]).sum(0)
        for name in floats(tuned[0])
    }
