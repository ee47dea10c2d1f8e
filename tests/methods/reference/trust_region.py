"""Trust-region task arithmetic: every pair of tasks by itself, all entries sorted; in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._weights import Weights, flat, unflat


def trust_region(base: Weights, tuned: Sequence[Weights], scaling_factor: float, density: float) -> Weights:
    vectors = [flat(model).double() - flat(base).double() for model in tuned]
    meeting = torch.zeros_like(vectors[0])
    for i, one in enumerate(vectors):
        for j, other in enumerate(vectors):
            if i != j:
                meeting += one.abs() * other.abs()
    threshold = meeting.sort().values[int(density * len(meeting)) - 1]
    kept = torch.where((meeting < threshold) | (meeting == 0), sum(vectors), 0.0)  # type: ignore[arg-type]
    return unflat((flat(base).double() + scaling_factor * kept).float(), base)
