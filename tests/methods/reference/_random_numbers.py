"""The random numbers of a recipe, which are the package's own: references drop the same entries."""

from __future__ import annotations

import torch
from torch import Tensor

from mergecli.methods._kinds import Group


def uniform(name: str, like: Tensor, task: str, seed: int = 0) -> Tensor:
    """The random numbers that the recipe's seed gives for a whole tensor of a task."""
    return Group(name, None, torch.zeros(1, *like.shape), (True,), (task,), seed).uniform(0)
