"""Representation surgery as its paper writes it: a module, a loss, torch's own Adam and backward pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from tests.methods.reference._random_numbers import uniform


def start(rank: int, size: int, task: str, seed: int) -> Tensor:
    """(rank, D) the first layer before learning."""
    return (2 * uniform("surgery.down", task, torch.empty(rank, size), seed) - 1) / math.sqrt(size)


def batches(count: int, size: int, steps: int, task: str, seed: int) -> Iterator[Tensor]:
    """All images in the order of random numbers, and again."""

    def rounds() -> Iterator[Tensor]:
        for epoch in itertools.count():
            order = uniform("surgery.batches", f"{task} {epoch}", torch.empty(count), seed).argsort()
            yield from order.split(size)

    return itertools.islice(rounds(), steps)


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
