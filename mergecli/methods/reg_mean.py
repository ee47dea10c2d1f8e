"""RegMean: linear layers that give, on every task's inputs, nearly what that task's own would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group
from mergecli.methods._calibrated import Statistics, mean
from mergecli.methods._gram_statistics import GramStatistics, gram_of
from mergecli.methods._least_squares import Regression, is_measured
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RegMean(GramStatistics):
    """theta = mean + [sum_i G'_i]^-1 sum_i G'_i (theta_i - mean),  for the weight (transposed) of each linear layer

    G_i = (1 / n) sum_x x x^T over the inputs x of the layer in model i, every token of every image of its own task
    G'_i = alpha G_i + (1 - alpha) diag(G_i) + ridge m I,  m the mean of all diagonal entries; mean = (1 / T) sum_i theta_i

    Without a ridge this is [sum_i G'_i]^-1 sum_i G'_i theta_i as in the paper, written so that directions which no
    image shows, in which the sum has no inverse, keep the mean. Everything else is the plain mean. Solved in float64.
    """

    title: ClassVar[str] = "linear layers by least squares on each task's own inputs, else the mean"
    published = "RegMean"
    paper: ClassVar[str] = "Jin et al., ICLR 2023, arXiv 2212.09849"
    also_called: ClassVar[Mapping[str, str]] = {"clip_regmean": ""}
    merge_time: ClassVar[frozenset[str]] = GramStatistics.merge_time | {"reduce_non_diagonal_ratio", "ridge"}

    reduce_non_diagonal_ratio: Annotated[float, Range(0, 1)] = 0.95
    """alpha: 1 is least squares, 0 weighs every input by itself."""
    ridge: Annotated[float, Range(0)] = 0.0
    """How strongly weights are drawn to the mean, as a share of the inputs' mean square; 0 is as published."""

    def merge(self, group: Group, learned: Statistics, /) -> Tensor:
        if self.excludes(group.name):
            return group.base.clone()
        if not is_measured(group.name, tuple(group.shape)):
            return mean(group)
        middle = group.tuned.double().mean(0)
        regression = Regression(self.reduce_non_diagonal_ratio, self.ridge)
        for task, tuned in enumerate(group.tuned):
            regression.add(gram_of(group, learned, task), {"": tuned.double() - middle})
        return middle.add_(regression.solve()[""]).float()
