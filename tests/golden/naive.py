"""The methods as their papers write them: whole models in memory, no cleverness, float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def floats(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if value.is_floating_point()}


def average(tuned: Sequence[Weights]) -> Weights:
    return {name: sum(model[name] for model in tuned) / len(tuned) for name in floats(tuned[0])}  # type: ignore[misc]


def weighted_average(tuned: Sequence[Weights], weights: Sequence[float], normalize: bool) -> Weights:
    scale = sum(weights) if normalize else 1
    return {
        name: torch.stack([model[name] * (w / scale) for model, w in zip(tuned, weights, strict=True)]).sum(0)
        for name in floats(tuned[0])
    }


def task_arithmetic(base: Weights, tuned: Sequence[Weights], scaling_factor: float) -> Weights:
    return {
        name: value + scaling_factor * torch.stack([model[name] - value for model in tuned]).sum(0)
        for name, value in floats(base).items()
    }


def flat(weights: Weights) -> Tensor:
    return torch.cat([weights[name].reshape(-1) for name in sorted(floats(weights))])


def unflat(vector: Tensor, like: Weights) -> Weights:
    result: Weights = {}
    at = 0
    for name in sorted(floats(like)):
        count = like[name].numel()
        result[name] = vector[at : at + count].reshape(like[name].shape)
        at += count
    return result


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
