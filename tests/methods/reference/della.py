"""DELLA, row by row and entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._random_numbers import uniform
from tests.methods.reference._weights import Weights, floats


def della(
    base: Weights, tuned: Sequence[Weights], scaling_factor: float, drop_rate: float, window: float,
    aggregate: str, elect: bool,
) -> Weights:  # fmt: skip
    """Deep et al., section 3, row by row."""
    result = {}
    for name, value in floats(base).items():
        kept = []
        for number, model in enumerate(tuned, 1):
            delta = model[name] - value
            rows = delta.flatten(1) if delta.dim() > 1 else delta.reshape(1, -1)
            noise = uniform(name, f"t{number}", value).reshape(rows.shape)
            new: list[float] = []
            for row, drawn in zip(rows.tolist(), noise.tolist(), strict=True):
                out = [0.0] * len(row)
                for rank, at in enumerate(sorted(range(len(row)), key=lambda at: -abs(row[at]))):
                    drop = drop_rate - window / 2 + window * rank / len(row)
                    out[at] = row[at] / (1 - drop) if drawn[at] >= drop else 0
                new += out
            kept.append(torch.tensor(new).reshape(value.shape))
        stacked = torch.stack(kept)
        if elect:
            stacked = torch.where(stacked.sign() == stacked.sum(0).sign(), stacked, 0)
        merged = stacked.sum(0)
        if aggregate == "mean":
            merged = merged / (stacked != 0).sum(0).clamp(min=1)
        result[name] = value + scaling_factor * merged
    return result
