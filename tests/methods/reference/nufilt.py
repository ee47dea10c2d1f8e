"""NUFILT by autograd and torch's own Adam, in float64, with full decompositions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.methods.reference._weights import Weights, floats


def nufilt(
    base: Weights,
    tuned: Sequence[Weights],
    starts: Sequence[Mapping[str, Tensor]],
    steps: int,
    learning_rate: float,
) -> Weights:
    """The last merge of the chain.

    Args:
        starts: of each model after the first, matrix -> (r, I) the random A.
    """
    result = {name: value.double() for name, value in floats(base).items()}
    for name, origin in list(result.items()):
        if "layers" not in name or origin.dim() != 2 or name.endswith("fc2.weight"):
            continue
        merged = tuned[0][name].double() - origin
        for number, model in enumerate(tuned[1:]):
            new = model[name].double() - origin
            merged = step(merged, new, starts[number][name].double(), steps, learning_rate)
        result[name] = origin + merged
    return {name: value.float() for name, value in result.items()}


def step(before: Tensor, new: Tensor, start: Tensor, steps: int, learning_rate: float) -> Tensor:
    inputs = before.shape[1]
    used = torch.linalg.svd(before)[2][: min(128, inputs // 6)].T
    own = torch.linalg.svd(new, full_matrices=False)[2][:8].T
    filtered = torch.eye(inputs, dtype=torch.float64) - used @ used.T
    second = start.clone().requires_grad_()
    first = torch.zeros(inputs, len(start), dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([first, second], lr=learning_rate)
    for _ in range(steps):
        mixed = new @ first @ second
        wanted = new @ own - (before + new @ filtered + mixed) @ own
        loss = wanted.square().sum() + (mixed @ used).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (before + new @ (filtered + first @ second)).detach()
