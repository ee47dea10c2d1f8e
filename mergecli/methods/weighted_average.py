"""A weighted mean of the fine-tuned weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mergecli.methods._base import Group, PerTensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WeightedAverage(PerTensor):
    """theta = sum_i w_i theta_i,  with w_i / sum_j w_j in place of w_i if `normalize`

    The base is not part of the sum and is not needed.
    """

    title: ClassVar[str] = "a weighted mean of the fine-tuned weights"
    paper: ClassVar[str] = "Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482"
    needs_base: ClassVar[bool] = False

    weights: tuple[float, ...]
    """One weight a task, in the order of `[tuned]`; negative ones are allowed."""
    normalize: bool = True
    """Whether the weights are divided by their sum, which then may not be 0."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        weights = settings["weights"]
        if len(weights) != len(tasks):
            return [("weights", f"expected one number for each of {len(tasks)} models, got {len(weights)}")]
        if settings.get("normalize", True) and abs(sum(weights)) <= 1e-9 * max(map(abs, weights)):
            return [("weights", "the weights add up to 0 and cannot be normalized; set `normalize = false`")]
        return []

    def merge(self, group: Group, /) -> Tensor:
        scale = sum(self.weights) if self.normalize else 1.0
        tuned = group.tuned
        result = tuned[0].mul_(self.weights[0] / scale)
        for row, weight in zip(tuned[1:], self.weights[1:], strict=True):
            result += row.mul_(weight / scale)
        return result
