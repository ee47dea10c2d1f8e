"""EMR-Merging: every task's tower as a whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._weights import Weights, floats


def emr(base: Weights, tuned: Sequence[Weights]) -> list[Weights]:
    """Huang et al. and FusionBench: every task's tower."""
    unified: Weights = {}
    vectors = [{name: model[name] - value for name, value in floats(base).items()} for model in tuned]
    for name in floats(base):
        sign = 2.0 * (torch.stack([vector[name] for vector in vectors]).sum(0) > 0) - 1
        unified[name] = torch.zeros_like(sign)
        for vector in vectors:
            agrees = vector[name] * sign > 0
            unified[name] = torch.where(
                agrees, torch.maximum(unified[name], vector[name].abs()), unified[name]
            )
        unified[name] *= sign
    towers = []
    for vector in vectors:
        kept = {name: (vector[name] * unified[name] > 0) * unified[name] for name in unified}
        sums = [
            sum(float(each.double().abs().mean()) for each in model.values() if each.numel())
            for model in (vector, kept)
        ]
        rescaler = sums[0] / sums[1] if sums[1] else 0.0
        towers.append({name: base[name] + rescaler * kept[name] for name in kept})
    return towers
