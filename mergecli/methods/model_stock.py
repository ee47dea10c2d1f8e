"""Model Stock: as far from the base towards the mean as the angle between the models says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._cosine import cosines, inner_products

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelStock(PerTensor):
    """theta = t mean_i theta_i + (1 - t) theta_0,  t = T cos(a) / (1 + (T - 1) cos(a)),  per tensor

    a is the mean angle between the task vectors of all pairs of models; a task vector that is 0 is at a right angle
    to all. For at least two models.

    Differs from the paper: with more than two models the paper assumes one angle; as FusionBench does, the mean of
    the angles is taken (mergekit: of the cosines). t is never negative: where the mean angle is more than a right
    one, the base is kept.
    """

    title: ClassVar[str] = "from the base towards the mean, as far as the angle between the models says"
    paper: ClassVar[str] = "Jang et al., Model Stock, ECCV 2024, arXiv 2403.19522, equation 5"
    elementwise: ClassVar[bool] = False

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        del settings
        return (
            [] if len(tasks) >= 2 else [("name", f"`model_stock` merges at least 2 models, got {len(tasks)}")]
        )

    def merge(self, group: Group, /) -> Tensor:
        count = group.tasks
        deltas = group.deltas
        cosine = cosines(inner_products(deltas)).tolist()
        angles = [math.acos(cosine[i][j]) for i in range(count) for j in range(i)]
        mean = max(0.0, math.cos(sum(angles) / len(angles)))
        ratio = count * mean / (1 + (count - 1) * mean)
        return total(deltas).mul_(ratio / count).add_(group.base)
