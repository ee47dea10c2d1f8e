"""Task arithmetic: the base plus the scaled sum of the task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._continual import ScaledVector, Step
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TaskArithmetic(ScaledVector, PerTensor):
    """theta = theta_0 + lambda sum_i (theta_i - theta_0)"""

    title: ClassVar[str] = "the base plus the scaled sum of the task vectors"
    published = "Task Arithmetic"
    paper: ClassVar[str] = "Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089"
    also_called: ClassVar[Mapping[str, str]] = {"ta": "", "task_vectors": ""}

    scaling_factor: Annotated[float, Range()] = 0.3
    """lambda; 0 gives the base back, 1 / T the average, a negative value forgets."""

    def merge(self, group: Group, /) -> Tensor:
        return self.whole(Step(group))

    def remember(self, step: Step, /) -> Tensor:
        return total(step.group.deltas)
