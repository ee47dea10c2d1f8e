"""TALL masks: one task's model, cut out of the summed task vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from mergecli.errors import did_you_mean
from mergecli.methods._kinds import Group, PerTensor, total
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TallMask(PerTensor):
    """theta = theta_0 + m_t tau,  tau = sum_i tau_i,  m_t = 1 where |tau_t| > mask_threshold |tau - tau_t|, else 0

    The result is the model of one task, `task`, and worth little on the others; `consensus` merges them into one.
    FusionBench compares theta_0 in place of 0 with tau_t, which makes its masks nearly all 1; this is the paper's.
    """

    title: ClassVar[str] = "one task's model, cut out of the summed task vector by that task's mask"
    paper: ClassVar[str] = "Wang et al., Localizing task information, ICML 2024, arXiv 2405.07813, equation 5"

    task: str
    """The task whose model is wanted, by its name in `[tuned]`."""
    mask_threshold: Annotated[float, Range(0)] = 0.6
    """How much larger than the other tasks' sum an entry must be to be kept; 0 keeps all where tau_t is not 0."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        name = settings["task"]
        if name in tasks:
            return []
        return [
            ("task", f"there is no model `{name}`{did_you_mean(name, tasks)}; there are {', '.join(tasks)}")
        ]

    def merge(self, group: Group, /) -> Tensor:
        deltas = group.deltas
        merged = total(deltas)
        own = deltas[group.names.index(self.task)]
        others = (merged - own).abs_().mul_(self.mask_threshold)
        return merged.masked_fill_(own.abs() <= others, 0).add_(group.base)
