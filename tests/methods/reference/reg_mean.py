"""RegMean of whole models, as the paper's formula has it, in float64."""

from __future__ import annotations

from collections.abc import Sequence

from tests.methods.reference._linear_layers import closed_form
from tests.methods.reference._weights import Weights


def reg_mean(
    tuned: Sequence[Weights], inputs: Sequence[Weights], alpha: float, ridge: float = 0.0
) -> Weights:
    """Linear layers by the closed form, the rest by the mean."""
    return {
        name: closed_form(
            [model[name] for model in tuned], [each[name] for each in inputs], alpha, ridge
        ).float()
        if name in inputs[0]
        else sum(model[name] for model in tuned) / len(tuned)  # type: ignore[misc]
        for name in tuned[0]
    }
