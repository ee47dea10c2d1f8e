"""ACE-Merging as its authors' program has it, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._svd import by_matrix, svd
from tests.methods.reference._weights import Weights


def ace_merging(
    base: Weights, tuned: Sequence[Weights], scaling_factor: float, ridge: float, heterogeneity: float,
    spectral_share: float,
) -> Weights:  # fmt: skip
    """As the authors' program computes it."""

    def merge(deltas: Sequence[Tensor]) -> Tensor:
        tasks, inputs = len(deltas), deltas[0].shape[1]
        identity = torch.eye(inputs, dtype=torch.float64)
        squares = torch.stack([torch.trace(d.T @ d) for d in deltas])
        logs = torch.log(squares + 1e-12)
        refine = tasks > 1 and bool(logs.var() / (logs.mean() ** 2 + 1e-12) > heterogeneity)
        centered = [d - d.mean(0, keepdim=True) for d in deltas]
        traces = [torch.trace(d.T @ d) + 1e-12 if refine else torch.tensor(1.0).double() for d in centered]
        bare = [d.T @ d / trace for d, trace in zip(centered, traces, strict=True)]
        ridged = [c + ridge / trace * identity for c, trace in zip(bare, traces, strict=True)]
        shared = sum(bare).mean(0, keepdim=True)  # type: ignore[union-attr]
        if refine:
            shared = shared / (squares.mean() + 1e-12)
        merged = sum(d @ c for d, c in zip(centered, ridged, strict=True)) @ torch.linalg.inv(
            sum(ridged) + shared
        )
        if refine:
            away = sum(d @ (c - sum(ridged) / tasks) for d, c in zip(deltas, bare, strict=True))
            left, values, right = svd(away + merged)
            k = int(len(values) * spectral_share)
            if k:
                merged = merged + values[:k].mean() * left[:, :k] @ right[:k]
        return merged

    return by_matrix(base, tuned, merge, scaling_factor)
