"""DOGE on AdaMerging: one correction a task by autograd and torch's own Adam, then AdaMerging; in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._adamerging_loop import Found, Sight, deltas_of, weighted
from tests.methods.reference._svd import svd
from tests.methods.reference._weights import Weights


def doge_ada_merging(
    sight: Sight, base: Weights, tuned: Sequence[Weights], *, steps: int, learning_rate: float, start: float = 0.3,
    density: float = 0.3, correction_steps: int, correction_rate: float, correction_scale: float = 0.07,
) -> Found:  # fmt: skip
    matrices = [
        name for name in base if ".layers." in name and name.endswith("weight") and "norm" not in name
    ]
    deltas, tasks = deltas_of(base, tuned), len(tuned)
    whole = [torch.cat([delta[name].flatten() for name in matrices]).abs() for delta in deltas]
    least = [each.sort(descending=True).values[int(len(each) * density) - 1] for each in whole]
    vectors = [{name: torch.zeros_like(delta[name]) for name in base} for delta in deltas]
    for name in matrices:
        own = [delta[name] for delta in deltas]
        corrected = corrections(own, correction_steps, correction_rate, correction_scale)
        for task, (tau, d) in enumerate(zip(own, corrected, strict=True)):
            vectors[task][name] = (tau + d) * (tau.abs() >= least[task])
    c = torch.full((tasks, len(base)), start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([c], lr=learning_rate)
    entropies: list[list[float]] = []
    for step in range(steps):
        loss, each = sight.loss(weighted(base, vectors, c), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        entropies.append(each)
    with torch.no_grad():
        return Found(weighted(base, vectors, c), c.detach(), {}, entropies)


def corrections(vectors: Sequence[Tensor], steps: int, rate: float, scale: float) -> list[Tensor]:
    """d_i of each task for one matrix."""
    size = min(vectors[0].shape) // len(vectors)
    stacked = torch.cat([svd(v)[0][:, : max(1, size)] for v in vectors], dim=1)
    common = svd(stacked)[0][:, :size]
    scales = [scale / v.norm() for v in vectors]
    found = [torch.zeros_like(v).requires_grad_() for v in vectors]
    optimizer = torch.optim.Adam(found, lr=rate)
    for _ in range(steps):
        moved = sum(s * (v + d) for s, v, d in zip(scales, vectors, found, strict=True))
        loss = sum((v * (v - moved)).sum(1).square().sum() for v in vectors)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        for d in found:
            assert d.grad is not None
            d.grad -= common @ common.T @ d.grad
        optimizer.step()
    return [d.detach() for d in found]
