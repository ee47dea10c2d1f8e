"""Model Breadcrumbs: drop the smallest and the largest entries of each tensor, then add the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from mergecli.methods._base import Group, Groups, TwoPass, total
from mergecli.methods._kth_largest import kth_largest_by_tensor
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


class Surveyed(NamedTuple):
    """Tensor's name -> (T,) the magnitudes that are kept."""

    smallest: dict[str, Tensor]
    """Infinity where none is."""
    largest: dict[str, Tensor]


@dataclass(frozen=True)
class Breadcrumbs(TwoPass):
    """theta = theta_0 + lambda sum_i t_i,  t_i = tau_i without its smallest and its largest entries, tensor by tensor

    Of n entries the int(drop_smallest n) of smallest and the int(drop_largest n) of largest magnitude are dropped;
    entries that tie with a kept one are kept. mergekit rounds down how many are kept, and so keeps up to two fewer of a
    tensor; the authors' program ranks every row, along the last dimension, by itself.
    """

    title: ClassVar[str] = "the smallest and the largest entries of each tensor dropped, the rest added"
    paper: ClassVar[str] = "Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795"
    passes: ClassVar[int] = 3

    scaling_factor: Annotated[float, Range()] = 0.3
    """lambda; 0 gives the base back."""
    drop_smallest: Annotated[float, Range(0, 1)] = 0.9
    """Fraction of each task vector's tensor dropped from below (the paper's beta); 0 drops none."""
    drop_largest: Annotated[float, Range(0, 1)] = 0.01
    """Fraction dropped from above (1 - the paper's gamma); 0 drops none. Both together are at most 1."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        del tasks
        small = settings.get("drop_smallest", cls.drop_smallest)
        large = settings.get("drop_largest", cls.drop_largest)
        if small + large > 1:
            return [("drop_largest", f"more than everything is dropped: {small:g} and {large:g}")]
        return []

    def survey(self, groups: Groups, /) -> Surveyed:
        def above(entries: int) -> int:
            return int(self.drop_largest * entries)

        def kept(entries: int) -> int:
            below = int(self.drop_smallest * entries)
            return entries - below if below + above(entries) < entries else 0

        return Surveyed(
            *kth_largest_by_tensor(groups, [kept, lambda entries: min(entries, above(entries) + 1)])
        )

    def merge(self, group: Group, surveyed: Surveyed, /) -> Tensor:
        limits = zip(*(each[group.name].tolist() for each in surveyed), strict=True)
        for row, (smallest, largest) in zip(group.deltas, limits, strict=True):
            magnitudes = row.abs()
            row.masked_fill_((magnitudes < smallest) | (magnitudes > largest), 0)
        return total(group.deltas).mul_(self.scaling_factor).add_(group.base)
