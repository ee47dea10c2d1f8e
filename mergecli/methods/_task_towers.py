"""What towers share that send each image on through weights which they choose for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def body_of(tower: nn.Module) -> nn.Module:
    """The same tower, with its parameters, its buffers and its own `forward`, whatever becomes of the tower's."""
    shared = {id(each): each for each in (*tower.parameters(), *tower.buffers())}
    return copy.deepcopy(tower, shared)


def joined(parts: Sequence[tuple[Tensor, Any]]) -> Any:
    """The tower's output for all images, of (images, output) pairs: the numbers of some images, and what they gave."""
    order = torch.cat([images for images, _ in parts]).argsort()
    first = parts[0][1]
    if isinstance(first, Tensor):
        return torch.cat([output for _, output in parts])[order]
    # a tower of transformers gives a table of several tensors
    tensors = {
        key: torch.cat([output[key] for _, output in parts])[order]
        for key, value in first.items()
        if isinstance(value, Tensor)
    }
    return type(first)(**tensors)
