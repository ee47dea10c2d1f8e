"""Consensus merging: keep the entries of the summed task vector that matter to several tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Consensus(PerTensor):
    """theta = theta_0 + lambda m tau,  tau = sum_i tau_i,  m = 1 where at least k of the masks m_i are, else 0

    m_i = 1 where |tau_i| > mask_threshold |tau - tau_i|:  the TALL mask of task i
    """

    title: ClassVar[str] = "the entries of the summed task vector that several tasks' masks agree on"
    paper: ClassVar[str] = (
        "Wang et al., Localizing task information, ICML 2024, arXiv 2405.07813, equations 5 and 7"
    )
    published = "Consensus Task Arithmetic"

    scaling_factor: Annotated[float, Range()] = 0.3
    """lambda; 0 gives the base back."""
    agreeing_tasks: Annotated[int, Range(0)] = 2
    """k; 0 keeps every entry (task arithmetic), 1 drops what matters to no task, 2 what matters to one alone too."""
    mask_threshold: Annotated[float, Range(0)] = 0.6
    """How much larger than the other tasks' sum an entry must be to matter to its task; 0 is any entry that is not 0."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        wanted = settings.get("agreeing_tasks", cls.agreeing_tasks)
        if wanted > len(tasks):
            return [("agreeing_tasks", f"expected at most the number of tasks, {len(tasks)}, got {wanted}")]
        return []

    def merge(self, group: Group, /) -> Tensor:
        import torch

        deltas = group.deltas
        merged = total(deltas)
        agreeing = torch.zeros_like(merged)
        for row in deltas:
            agreeing += row.abs() > (merged - row).abs_().mul_(self.mask_threshold)
        merged.masked_fill_(agreeing < self.agreeing_tasks, 0)
        return merged.mul_(self.scaling_factor).add_(group.base)
