"""MagMax: of each entry, the task vector of largest magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group, PerTensor
from mergecli.methods._continual import ScaledVector, Step
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Magmax(ScaledVector, PerTensor):
    """theta = theta_0 + lambda tau_j,  entry by entry, j the task whose |tau_j| is largest

    Of two task vectors that differ only in sign the positive one wins; in FusionBench the later one does.
    """

    title: ClassVar[str] = "of each entry, the task vector of largest magnitude"
    paper: ClassVar[str] = "Marczak et al., MagMax, ECCV 2024, arXiv 2407.06322"
    why_not_without: ClassVar[str] = "of each entry only the largest is remembered, and not the next one"

    scaling_factor: Annotated[float, Range()] = 0.5
    """lambda; 0 gives the base back."""

    def merge(self, group: Group, /) -> Tensor:
        return self.whole(Step(group))

    def remember(self, step: Step, /) -> Tensor:
        import torch

        deltas = step.group.deltas
        high, low = deltas.amax(0), deltas.amin(0)
        return torch.where(high + low >= 0, high, low)
