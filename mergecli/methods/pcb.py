"""PCB merging: weights by how parameters compete within a task and between tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from mergecli.methods._base import Group, Groups, TwoPass, total
from mergecli.methods._kth_largest import Rank, kth_largest
from mergecli.methods._settings import Fraction, Range

if TYPE_CHECKING:
    from torch import Tensor

_OUTLIERS = 0.0001


class Surveyed(NamedTuple):
    """What PCB knows of the whole model before it merges a tensor: (T,) each."""

    smallest: Tensor
    """The magnitude to which smaller ones are raised."""
    largest: Tensor
    """The magnitude to which larger ones are lowered."""
    threshold: Tensor
    """The score below which an entry has no weight."""
    top: Tensor
    """The largest score."""


@dataclass(frozen=True)
class Pcb(TwoPass):
    """theta = theta_0 + lambda sum_i w_i t_i / sum_i w_i,  entry by entry:

    clip   t_i = tau_i with magnitudes cut at the 0.01 % and the 99.99 % quantile of its whole task vector
    intra  a_i = exp(T n_i^2),  n_i = (|t_i| - min |t_i|) / (max |t_i| - min |t_i|)
    inter  e_i = tanh(tau_i sum_j tau_j)
    drop   w_i = (a_i e_i - b_i) / (max a_i e_i - b_i) where that is positive, else 0;  b_i is the score that the
           largest `density` of the task vector's entries reach

    Differs from the paper: there both balances are softmaxes over all entries, of normalized tau_i tau_i and
    tau_i tau_j; this is what the authors' program computes. Where all weights are 0 the base is kept.
    """

    title: ClassVar[str] = "task vectors weighted by how entries compete within and between tasks"
    paper: ClassVar[str] = (
        "Du et al., Parameter competition balancing, NeurIPS 2024, arXiv 2410.02396, section 3"
    )
    passes: ClassVar[int] = 3

    scaling_factor: Annotated[float, Range()] = 1.2
    """lambda; 0 gives the base back."""
    density: Fraction = 0.1
    """Fraction of each task vector's entries that have a weight; 1 gives one to all but the lowest."""

    def survey(self, groups: Groups, /) -> Surveyed:
        lowest = Rank(1.0, lambda entries: entries - int(entries * _OUTLIERS))
        highest = Rank(0.0, lambda entries: entries - max(0, int(entries * (1 - _OUTLIERS) - 1)))
        smallest, largest = kth_largest(groups, [lowest, highest], lambda group: group.deltas.abs_())
        kept = Rank(
            self.density, lambda entries: entries - min(int(entries * (1 - self.density)), entries - 1)
        )
        first = Rank(0.0, lambda entries: min(entries, 1))

        def scores(group: Group) -> Tensor:
            return self._scores(
                group.deltas, self._clipped(group.deltas, smallest, largest), smallest, largest
            )

        return Surveyed(smallest, largest, *kth_largest(groups, [kept, first], scores))

    def merge(self, group: Group, surveyed: Surveyed, /) -> Tensor:
        smallest, largest, threshold, top = surveyed
        deltas = group.deltas
        clipped = self._clipped(deltas, smallest, largest)  # (T, ...)
        weights = self._scores(deltas, clipped, smallest, largest)  # (T, ...)
        for row, low, high in zip(weights, threshold.tolist(), top.tolist(), strict=True):
            row.sub_(low).clamp_(min=0).div_(high - low if high > low else 1)
        merged = total(clipped.mul_(weights)).div_(total(weights).clamp_(min=1e-12))
        return merged.mul_(self.scaling_factor).add_(group.base)

    @staticmethod
    def _clipped(deltas: Tensor, smallest: Tensor, largest: Tensor) -> Tensor:
        """(T, ...) the task vectors with their magnitudes cut."""
        clipped = deltas.abs()
        for row, low, high in zip(clipped, smallest.tolist(), largest.tolist(), strict=True):
            row.clamp_(low, high)
        return clipped.mul_(deltas.sign())

    @staticmethod
    def _scores(deltas: Tensor, clipped: Tensor, smallest: Tensor, largest: Tensor) -> Tensor:
        """(T, ...) the product of both balances."""
        count = len(deltas)
        summed = total(deltas)
        scores = clipped.abs()
        for row, delta, low, high in zip(scores, deltas, smallest.tolist(), largest.tolist(), strict=True):
            row.sub_(low).clamp_(min=0).div_(high - low if high > low else 1)
            row.square_().mul_(count).exp_().mul_((delta * summed).tanh_())
        return scores
