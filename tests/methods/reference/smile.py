"""SMILE, one token after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._weights import Weights


def smile(
    base: Weights,
    tuned: Sequence[Weights],
    layer: str,
    inputs: Tensor,
    rank: int,
    gate_rank: int,
    experts_per_token: int,
) -> tuple[Tensor, Tensor]:
    """Tang et al.: (B, L, m) outputs of one linear layer for (B, L, n) inputs, and (B, L, T) routing weights."""
    weight, bias = base[f"{layer}.weight"].double(), base[f"{layer}.bias"].double()
    experts = []
    for model in tuned:
        left, values, right = torch.linalg.svd(
            model[f"{layer}.weight"].double() - weight, full_matrices=False
        )
        rows, columns = weight.shape
        factors = min(rank, rows, columns) * (rows + columns)
        whole = factors > columns * (rows + min(gate_rank, rows, columns))  # what takes less room is kept
        k = None if whole else rank
        experts.append((left[:, :k], values[:k], right[:k], model[f"{layer}.bias"].double() - bias))
    outputs = torch.zeros(*inputs.shape[:2], len(weight), dtype=torch.float64)
    routes = torch.zeros(*inputs.shape[:2], len(tuned), dtype=torch.float64)
    for image in range(len(inputs)):
        for token in range(inputs.shape[1]):
            x = inputs[image, token].double()
            chances = torch.stack([(right[:gate_rank] @ x).norm() for _, _, right, _ in experts]).softmax(0)
            chosen = chances.argsort(descending=True)[:experts_per_token].tolist()
            y = weight @ x + bias
            for task in chosen:
                left, values, right, offset = experts[task]
                share = chances[task] / chances[chosen].sum()
                routes[image, token, task] = share
                y = y + share * (left @ (values * (right @ x)) + offset)
            outputs[image, token] = y
    return outputs.float(), routes.float()
