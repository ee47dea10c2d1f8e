"""LiNeS on what another method has merged."""

from __future__ import annotations

from tests.methods.reference._weights import Weights, floats


def lines(
    base: Weights, merged: Weights, depths: dict[str, float], first_layer: float, increase: float
) -> Weights:
    return {
        name: value + (first_layer + increase * depths[name]) * (merged[name] - value)
        for name, value in floats(base).items()
    }
