"""Model Breadcrumbs: drop the smallest and the largest entries of each tensor, then add the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Breadcrumbs(PerTensor):
    """theta = theta_0 + lambda sum_i t_i,  t_i = tau_i without its smallest and its largest entries, tensor by tensor

    Of n entries the int(drop_smallest n) of smallest and the int(drop_largest n) of largest magnitude are dropped;
    entries that tie with a kept one are kept. mergekit rounds down how many are kept, and so keeps up to two fewer of a
    tensor; the authors' program ranks every row, along the last dimension, by itself.
    """

    title: ClassVar[str] = "the smallest and the largest entries of each tensor dropped, the rest added"
    paper: ClassVar[str] = "Davari and Belilovsky, Model Breadcrumbs, ECCV 2024, arXiv 2312.06795"
    elementwise: ClassVar[bool] = False

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

    def merge(self, group: Group, /) -> Tensor:
        for row in group.deltas:
            self._thin(row.view(-1))
        return total(group.deltas).mul_(self.scaling_factor).add_(group.base)

    def _thin(self, entries: Tensor) -> None:
        """Sets the smallest and the largest of (n,) entries to 0."""
        import numpy as np

        below, above = int(self.drop_smallest * len(entries)), int(self.drop_largest * len(entries))
        if below + above >= len(entries):
            entries.zero_()
            return
        magnitudes = entries.abs()
        last = len(entries) - above - 1
        ordered = np.partition(magnitudes.cpu().numpy(), (below, last))
        outside = (magnitudes < float(ordered[below])) | (magnitudes > float(ordered[last]))
        entries.masked_fill_(outside, 0)
