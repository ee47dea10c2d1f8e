"""The plain mean of the fine-tuned weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._continual import Continual, Remembered, Step

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Average(Continual, PerTensor):
    """theta = (1 / T) sum_i theta_i

    The base is not part of the sum and is not needed. The order of tasks matters only to the last bits.
    """

    title: ClassVar[str] = "the mean of the fine-tuned weights"
    published = "Simple Averaging"
    paper: ClassVar[str] = "Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482"
    also_called: ClassVar[Mapping[str, str]] = {"simple_average": "", "model_soup": "", "mean": ""}
    needs_base: ClassVar[bool] = False
    remembers: ClassVar[Remembered] = "sum"

    def merge(self, group: Group, /) -> Tensor:
        return self.whole(Step(group))

    def remember(self, step: Step, /) -> Tensor:
        return total(step.group.tuned)

    def weights(self, memory: Tensor, step: Step, /) -> Tensor:
        return memory.div_(step.merged)

    @property
    def can_recall(self) -> bool:
        return True

    def recall(self, weights: Tensor, step: Step, /) -> Tensor:
        return weights * step.chain.before
