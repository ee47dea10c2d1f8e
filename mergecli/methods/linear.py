"""Linear interpolation between two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from mergecli.methods._base import Group, PerTensor
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Linear(PerTensor):
    """theta = (1 - t) theta_1 + t theta_2

    For exactly two models, in the order of `[tuned]`; the base is not needed, and may be one of the two.
    """

    title: ClassVar[str] = "a straight line between two checkpoints"
    paper: ClassVar[str] = (
        "Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022, arXiv 2109.01903"
    )
    needs_base: ClassVar[bool] = False

    t: Annotated[float, Range()] = 0.5
    """Where on the line: 0 is the first model, 1 the second; values outside of [0, 1] go beyond them."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        del settings
        return [] if len(tasks) == 2 else [("name", f"`linear` merges exactly 2 models, got {len(tasks)}")]

    def merge(self, group: Group, /) -> Tensor:
        first, second = group.tuned
        return first.mul_(1 - self.t).add_(second, alpha=self.t)
