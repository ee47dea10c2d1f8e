"""Trust-region task arithmetic: task vectors without the entries in which tasks would disturb each other most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group, Groups, TwoPass, total
from mergecli.methods._kth_largest import Rank, kth_largest
from mergecli.methods._settings import Fraction, Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrustRegion(TwoPass):
    """theta = theta_0 + lambda sum_i tau_i,  in the entries where  O = sum_{i < j} |tau_i| |tau_j|  is below the
    int(density D)-th smallest of the model's D values, or 0;  theta_0 in the others

    O stands for how much a step along tau_j changes the loss of task i: |tau_i| takes the place of task i's gradient, the
    paper's zero-shot variant, which needs no images. (With images the gradient is that of the cross-entropy with labels,
    which methods do not see here. FusionBench stores all tasks' gradients under one name, so that it keeps the base.)

    Where O is 0 no two tasks meet: such entries are kept even if a share of `density` has an O of 0, as with one task;
    FusionBench then drops them all.
    """

    title: ClassVar[str] = "task arithmetic without the entries in which tasks would disturb each other most"
    paper: ClassVar[str] = "Sun et al., Task arithmetic in trust region, ICLR 2025, arXiv 2501.15065"
    also_called: ClassVar[Mapping[str, str]] = {
        "tatr": "", "task_arithmetic_in_trust_region": "", "trust_region_ta": "",
    }  # fmt: skip

    scaling_factor: Annotated[float, Range()] = 0.3
    """lambda; 0 gives the base back."""
    density: Fraction = 0.99
    """The fraction of the model's entries that are changed; 1 leaves out those of the largest O."""

    def survey(self, groups: Groups, /) -> float:
        rank = Rank(1 - self.density, lambda entries: entries - max(1, int(entries * self.density)) + 1)
        (threshold,) = kth_largest(groups, [rank], lambda group: _meeting(group.deltas)[None])
        return float(threshold)

    def merge(self, group: Group, surveyed: float, /) -> Tensor:
        deltas = group.deltas
        meeting = _meeting(deltas)
        kept = (meeting < surveyed) | (meeting == 0)
        return total(deltas).mul_(kept).mul_(self.scaling_factor).add_(group.base)


def _meeting(deltas: Tensor) -> Tensor:
    """(...) sum_{i < j} |tau_i| |tau_j|, summed so that nothing cancels."""
    before = deltas[0].abs()
    result = before * 0
    for delta in deltas[1:]:
        size = delta.abs()
        result += before * size
        before += size
    return result
