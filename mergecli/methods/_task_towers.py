"""What towers share that send each image on through weights which they choose for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Chosen = TypeVar("Chosen", bound=Hashable)
KEPT = 16
"""Projections that are held at once, those that were used last."""


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


class ImageProjections(nn.Module, Generic[Chosen]):
    """A visual projection behind such a tower: each image has its own, by what the tower has chosen for it."""

    def __init__(
        self,
        own: nn.Linear,
        chosen: Callable[[], Sequence[Chosen]],
        weights: Callable[[Chosen], Tensor],
    ) -> None:
        """Args:
        own: that of the base.
        chosen: what the tower has chosen for each image of the last forward pass.
        weights: (D, W) of what was chosen.
        """
        super().__init__()
        self.weight = own.weight
        self._chosen, self._weights = chosen, weights
        self._held: dict[Chosen, Tensor] = {}

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, D) of (B, W)."""
        chosen = self._chosen()
        result = pooled.new_empty(len(pooled), len(self.weight))
        for each in dict.fromkeys(chosen):
            rows = torch.tensor([row for row, own in enumerate(chosen) if own == each], device=pooled.device)
            result[rows] = functional.linear(pooled[rows], self._of(each))
        return result

    def _of(self, chosen: Chosen) -> Tensor:
        found = self._held.pop(chosen, None)
        if found is None:
            while len(self._held) >= KEPT:
                del self._held[next(iter(self._held))]
            found = self._weights(chosen).to(self.weight)
        self._held[chosen] = found
        return found


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
