"""Spherical interpolation between two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from mergecli.methods._base import Group, PerTensor
from mergecli.methods._cosine import cosines, inner_products
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor

_PARALLEL = 0.9995


@dataclass(frozen=True)
class Slerp(PerTensor):
    """theta = sin((1 - t) w) / sin(w) theta_1 + sin(t w) / sin(w) theta_2,  w the angle between the two, per tensor

    For exactly two models, in the order of `[tuned]`; the base is not needed. Each tensor is one long vector. Where
    |cos w| > 0.9995, or a tensor is 0 and has no direction, the line between the two is taken instead. FusionBench and
    mergekit take the angle to a tensor that is 0 for a right one.
    """

    title: ClassVar[str] = "an arc between two checkpoints, tensor by tensor"
    paper: ClassVar[str] = (
        "Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; for models: Goddard et al., MergeKit, "
        "EMNLP 2024, arXiv 2403.13257"
    )
    also_called: ClassVar[Mapping[str, str]] = {"nuslerp": ""}
    needs_base: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False

    t: Annotated[float, Range(0, 1)] = 0.5
    """Where on the arc: 0 is the first model, 1 the second."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        del settings
        return [] if len(tasks) == 2 else [("name", f"`slerp` merges exactly 2 models, got {len(tasks)}")]

    def merge(self, group: Group, /) -> Tensor:
        first, second = group.tuned
        products = inner_products(group.tuned)
        cosine = float(cosines(products)[0, 1])
        weights = (1 - self.t, self.t)
        if abs(cosine) <= _PARALLEL and float(products.diagonal().min()) > 0:
            angle = math.acos(cosine)
            weights = (
                math.sin((1 - self.t) * angle) / math.sin(angle),
                math.sin(self.t * angle) / math.sin(angle),
            )
        return first.mul_(weights[0]).add_(second, alpha=weights[1])
