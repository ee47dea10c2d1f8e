"""DOGE-TA by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tests.methods.reference._svd import svd
from tests.methods.reference._weights import Weights, floats


def doge_ta(
    base: Weights, tuned: Sequence[Weights], matrices: Sequence[str], scaling_factor: float, density: float,
    subspace_divisor: int, steps: int, learning_rate: float,
) -> Weights:  # fmt: skip
    """By autograd and torch's own Adam, in float32; only the named tensors change."""
    result = dict(floats(base))
    deltas = {name: torch.stack([model[name] - base[name] for model in tuned]) for name in matrices}
    whole = torch.cat([each.reshape(len(tuned), -1) for each in deltas.values()], dim=1).abs()
    keep = int(whole.shape[1] * density)
    least = whole.sort(dim=1, descending=True).values[:, keep - 1]
    for name, vectors in deltas.items():
        size, tasks = min(vectors.shape[1:]), len(tuned)
        scales = scaling_factor / vectors.flatten(1).norm(dim=1)
        leading = torch.cat([svd(v.double())[0][:, : max(1, size // tasks)] for v in vectors], dim=1)
        common = svd(leading)[0][:, : size // subspace_divisor].float()
        correction = torch.zeros_like(base[name]).requires_grad_()
        optimizer = torch.optim.Adam([correction], lr=learning_rate)
        summed = (scales.view(-1, 1, 1) * vectors).sum(0)
        for _ in range(steps):
            loss = sum((v * (v - summed - scales.sum() * correction)).sum(1).square().sum() for v in vectors)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            assert correction.grad is not None
            correction.grad -= common @ common.T @ correction.grad
            optimizer.step()
        masks = vectors.abs() >= least.view(-1, 1, 1)
        kept = (vectors + correction.detach()) * masks
        result[name] = base[name] + (scales.view(-1, 1, 1) * kept).sum(0)
    return result
