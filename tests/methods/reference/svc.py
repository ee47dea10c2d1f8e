"""Singular value calibration of what another method has merged, one singular vector after another, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._svd import svd
from tests.methods.reference._weights import Weights, floats


def svc(base: Weights, tuned: Sequence[Weights], merged: Weights, alpha: float) -> Weights:
    result = {}
    for name, value in floats(base).items():
        if value.dim() != 2 or not value.numel() or "position" in name:
            result[name] = merged[name]
            continue
        difference = merged[name].double() - value.double()
        deltas = [model[name].double() - value.double() for model in tuned]
        left, values, right = svd(difference)
        for r in range(len(values)):
            own = left[:, r] @ difference
            overlaps = []
            for delta in deltas:
                other = left[:, r] @ delta
                overlaps.append(max(alpha, float(own @ other) / max(float(other @ other), 1e-12)))
            values[r] *= len(deltas) / sum(overlaps)
        result[name] = (value + left @ torch.diag(values) @ right).float()
    return result
