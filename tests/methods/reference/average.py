"""The mean of whole models."""

from __future__ import annotations

from collections.abc import Sequence

from tests.methods.reference._weights import Weights, floats


def average(tuned: Sequence[Weights]) -> Weights:
    return {name: sum(model[name] for model in tuned) / len(tuned) for name in floats(tuned[0])}  # type: ignore[misc]
