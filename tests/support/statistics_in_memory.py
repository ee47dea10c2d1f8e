"""Statistics of methods that measure, made by hand, and the merge of one tensor with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergecli import methods
from mergecli.methods._base import Group, merge_group

LINEAR = "vision_model.encoder.layers.0.mlp.fc1.weight"
"""The weight of a linear layer."""


class Given:
    """Statistics in memory."""

    def __init__(self, *files: Mapping[str, Tensor]) -> None:
        self.files = files
        self.names = list(files[0])

    def read(self, file: int, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.files[file][name].flatten()[start:stop]


def fishers(*values: Tensor) -> Given:
    """The Fisher information of each task."""
    return Given(
        *({f"{LINEAR}.fisher": value, "squares": value.double().square().sum()[None]} for value in values)
    )


def grams(*values: Tensor) -> Given:
    """The Gram matrix of each task."""
    return Given(*({f"{LINEAR}.gram": value} for value in values))


def combine(method: str, given: Given, rows: Tensor, name: str = LINEAR, **settings: Any) -> Tensor:
    """The merged weights of one tensor, (T, ...) rows."""
    names = tuple(f"t{number}" for number in range(len(rows)))
    group = Group(name, torch.zeros(rows.shape[1:]), rows.clone(), (False,) * len(rows), names)
    return merge_group(methods.create(method, settings), group, given)


def some(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
