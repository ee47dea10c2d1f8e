"""TIES on whole task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._weights import Weights, flat, floats, unflat


def ties(
    base: Weights, tuned: Sequence[Weights], scaling_factor: float, density: float, aggregate: str,
    trim: str = "model", zero_sign: str = "zero",
) -> Weights:  # fmt: skip
    """Yadav et al., algorithm 1, on whole task vectors; `fusion_bench` keeps one entry more."""
    vectors = torch.stack([flat(model) - flat(base) for model in tuned])  # (T, D)
    if trim == "tensor":
        parts = [
            torch.stack([_trim((model[name] - base[name]).reshape(-1), density, 0) for model in tuned])
            for name in sorted(floats(base))
        ]
        trimmed = torch.cat(parts, dim=1)
    else:
        trimmed = torch.stack([_trim(vector, density, int(trim == "fusion_bench")) for vector in vectors])
    sign = torch.sign(trimmed.sum(0))
    if zero_sign == "majority":
        majority = torch.sign(sign.sum())
        sign[sign == 0] = majority if majority else -1.0
    selected = torch.where(trimmed * sign > 0, trimmed, 0)
    if aggregate == "sum":
        merged = selected.sum(0)
    elif aggregate == "mean":
        merged = selected.sum(0) / (selected != 0).sum(0).clamp(min=1)
    else:
        merged = selected.abs().amax(0) * sign
    return unflat(flat(base) + scaling_factor * merged, base)


def _trim(vector: Tensor, density: float, more: int) -> Tensor:
    keep = min(len(vector), int(len(vector) * density) + more)
    if keep == 0:
        return torch.zeros_like(vector)
    smallest = vector.abs().sort(descending=True).values[keep - 1]
    return torch.where(vector.abs() >= smallest, vector, 0)
