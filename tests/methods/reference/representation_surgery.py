"""Representation surgery as its paper writes it: a module, a loss, torch's own Adam and backward pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """f - U relu(D f)."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(size, rank, bias=False), nn.Linear(rank, size, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, features: Tensor) -> Tensor:
        return features - self.up(torch.relu(self.down(features)))


def representation_surgery(
    features: Tensor, wanted: Tensor, start: Tensor, batches: Iterable[Tensor], learning_rate: float
) -> tuple[Bottleneck, list[float]]:
    """One task's correction, and the loss of each batch, from the merged model's and the task's own model's (N, D) unit
    features, a (rank, D) start and the numbers of each batch's images."""
    module = Bottleneck(features.shape[1], len(start))
    with torch.no_grad():
        module.down.weight.copy_(start)
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=learning_rate), list[float]()
    for rows in batches:
        loss = nn.functional.l1_loss(module(features[rows]), wanted[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return module, losses
