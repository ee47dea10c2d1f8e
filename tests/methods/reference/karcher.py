"""The Karcher mean on the sphere, tensor by tensor, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._weights import Weights, floats


def karcher(tuned: Sequence[Weights], steps: int) -> Weights:
    """By the exponential and logarithmic maps on the tensors themselves."""
    result = {}
    for name in floats(tuned[0]):
        values = [model[name].double().reshape(-1) for model in tuned]
        radius = sum(value.norm() for value in values) / len(values)
        points = [value / value.norm() for value in values if value.norm() > 0]
        if not points:
            result[name] = tuned[0][name]
            continue
        mean = sum(points) / len(points)
        mean = mean / mean.norm()
        for _ in range(steps):
            tangent = torch.zeros_like(mean)
            for point in points:
                aside = point - (mean @ point) * mean
                if aside.norm() > 1e-12:
                    tangent += torch.atan2(aside.norm(), mean @ point) * aside / aside.norm() / len(points)
            length = tangent.norm()
            if length > 1e-14:
                mean = length.cos() * mean + length.sin() * tangent / length
                mean = mean / mean.norm()
        result[name] = (radius * mean).reshape(tuned[0][name].shape).float()
    return result
