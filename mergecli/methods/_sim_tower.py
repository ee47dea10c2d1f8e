"""A tower that finds the task of each image, and then is that task's tower.

Letters in shapes: T tasks, B images, D the size of features, q the directions of a task, W the size of a tower's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportUnknownVariableType]
from torch.nn import functional

from mergecli.methods._task_towers import WholeTower, body_of, joined

KEPT = 4
"""Weights of this many tasks are held at once, those that were used last: each is as large as a tower."""


@dataclass
class SimTower(WholeTower):
    """A tower whose `forward` sends each image through the tower of its task; its own weights are the base's."""

    tower: nn.Module
    body: nn.Module
    """The same tower, with its parameters and its own `forward`."""
    weights: Callable[[str, int], Tensor]
    """`weights(name, task)` gives a tensor of that task's tower."""
    means: Tensor
    """(T, D)."""
    bases: Tensor
    """(T, q, D)."""
    projection: Tensor
    """(D, W)."""
    chosen: Tensor
    """(B,) the number of the task of each image of the last forward pass."""
    _held: dict[int, dict[str, Tensor]] = field(default_factory=dict[int, dict[str, Tensor]])

    @classmethod
    def around(
        cls,
        tower: nn.Module,
        weights: Callable[[str, int], Tensor],
        means: Tensor,
        bases: Tensor,
        projection: Tensor,
    ) -> SimTower:
        """Puts it into a tower that has the base's weights already."""
        like = next(tower.parameters())
        body = body_of(tower)
        means, bases, projection = (
            each.to(like.device, torch.float32) for each in (means, bases, projection)
        )
        nobody = torch.zeros(0, dtype=torch.int64, device=like.device)
        self = cls(tower, body, weights, means, bases, projection, nobody)
        tower.forward = self.forward
        return self

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        """What the tower of each image's task gives."""
        whole = self.body(pixel_values=pixel_values)
        # a tower of transformers gives a table of several tensors
        pooled = whole if isinstance(whole, Tensor) else whole.pooler_output
        features = functional.normalize(pooled.float() @ self.projection.T, dim=1)
        self.chosen = nearest_task(features, self.means, self.bases)
        rows = [(task, (self.chosen == task).nonzero()[:, 0]) for task in self.chosen.unique().tolist()]
        found = [
            (
                own,
                functional_call(
                    self.body, self._of(task), (), {"pixel_values": pixel_values[own], **options}
                ),
            )
            for task, own in rows
        ]
        return joined(found)

    def _of(self, task: int) -> dict[str, Tensor]:
        """The weights of a task's tower, where the base's are."""
        found = self._held.pop(task, None)
        if found is None:
            while len(self._held) >= KEPT:
                del self._held[next(iter(self._held))]
            found = {name: self.weights(name, task).to(own) for name, own in self.body.named_parameters()}
        self._held[task] = found
        return found

    def routes(self) -> Mapping[str, Tensor]:
        """`tower` -> (B, T) 1 for the task of each image, else 0."""
        return {"tower": functional.one_hot(self.chosen, len(self.means)).to(self.means.dtype)}


def nearest_task(features: Tensor, means: Tensor, bases: Tensor) -> Tensor:
    """(B,) argmin_t |(I - V_t^T V_t) (f - mu_t)|, of (B, D) unit features f; of equal ones the first."""
    apart = features - means[:, None]  # (T, B, D)
    return (apart - apart @ bases.transpose(1, 2) @ bases).norm(dim=2).argmin(0)
