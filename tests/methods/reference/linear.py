"""The straight line between two models."""

from __future__ import annotations

from collections.abc import Sequence

from tests.methods.reference._weights import Weights, floats


def linear(tuned: Sequence[Weights], t: float) -> Weights:
    first, second = tuned
    return {name: (1 - t) * first[name] + t * second[name] for name in floats(first)}
