"""DOP by autograd and torch's own Adam, in float64, with the two losses as they are written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._weights import Weights, floats


def dop(base: Weights, tuned: Sequence[Weights], steps: int, learning_rate: float, balance: str) -> Weights:
    """The last merge of the chain."""
    merged = {name: tuned[0][name].double() for name in floats(base)}
    for model in tuned[1:]:
        for name, old in merged.items():
            new = model[name].double()
            is_map = old.dim() == 2 and old.numel() and "position" not in name
            merged[name] = (
                descent(base[name].double(), old, new, steps, learning_rate, balance)
                if is_map
                else (old + new) / 2
            )
    return {name: value.float() for name, value in merged.items()}


def descent(base: Tensor, old: Tensor, new: Tensor, steps: int, learning_rate: float, balance: str) -> Tensor:
    weights = ((old + new) / 2).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=learning_rate)
    share = 0.8
    sides = [factors(end - base) for end in (old, new)]
    for _ in range(steps):
        losses = [loss(weights - end, *each) for end, each in zip((old, new), sides, strict=True)]
        if balance == "min_norm":
            slopes = [
                torch.autograd.grad(each, weights, retain_graph=True)[0] / each.detach() for each in losses
            ]
            share = 0.999 * share + 0.001 * shortest(*slopes)
        optimizer.zero_grad()
        (share * losses[0] + (1 - share) * losses[1]).backward()
        optimizer.step()
    return weights.detach()


def factors(change: Tensor) -> tuple[Tensor, Tensor]:
    """diag(s) U^T and V diag(s) of the leading part."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    count = int((values.cumsum(0) / values.sum() < 0.99999).sum())
    scale = torch.diag(values[:count])
    return scale @ left[:, :count].T, right[:count].T @ scale


def loss(apart: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return (left @ apart).square().sum() + (apart @ right).square().sum()


def shortest(first: Tensor, second: Tensor) -> float:
    """The share of the first in the shortest sum of two vectors, by trying many."""
    shares = torch.linspace(0.001, 0.999, 4001, dtype=torch.float64)
    one, both, other = ((a * b).sum() for a, b in ((first, first), (first, second), (second, second)))
    lengths = shares**2 * one + 2 * shares * (1 - shares) * both + (1 - shares) ** 2 * other
    return float(shares[lengths.argmin()])
