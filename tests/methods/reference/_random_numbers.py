"""The random numbers of a recipe, which are the package's own: references drop the same entries and draw the same masks."""

from __future__ import annotations

from torch import Tensor

from mergecli.methods._base import uniform as drawn


def uniform(name: str, label: str, like: Tensor, seed: int = 0) -> Tensor:
    """Random numbers in [0, 1) for every entry of a tensor, of a task or whatever else the label says."""
    return drawn(seed, name, label, 0, like.numel()).view(like.shape)
