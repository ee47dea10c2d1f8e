"""What towers share that send each image on through weights which they choose for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class WholeTower:
    """What a tower of which every image finds its own weights says of itself: its routing is in the file already."""

    tower: nn.Module
    """The tower whose `forward` was replaced."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Nothing: no router is learned."""
        return {}

    @property
    def keeps_batches_whole(self) -> bool:
        """No: every image finds its own weights."""
        return False

    def remove(self) -> None:
        """Leaves the base's tower."""
        del self.tower.forward


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
