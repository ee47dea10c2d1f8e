"""Concrete TSV-M: what TSV-M merges, under a learned mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group
from mergecli.methods._concrete_masks import final_mask
from mergecli.methods._learned import LearnedTensors
from mergecli.methods._settings import Range
from mergecli.methods._svd import PositionEmbedding
from mergecli.methods.concrete_task_arithmetic import ConcreteTaskArithmetic
from mergecli.methods.tsv_m import TsvM

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ConcreteTsvM(ConcreteTaskArithmetic):
    """theta = theta_0 + lambda (m / mean(m)) tau,  tau as TSV-M merges the task vectors,  m as in Concrete task arithmetic

    one phi for each entry of the model, minimizing  sum_t mean_x H(softmax(logits_t(x; theta)))  by `steps` steps of Adam
    with decay of the weights (AdamW), each with a newly drawn mask. The mask is shared by all tasks, so that it is the same
    whether it is laid over each task's part of TSV-M's product or over their sum.

    In FusionBench tensors that are no matrices get the sum of the task vectors, T times what TSV-M gives them, because each
    task's part is the mean; here they get the mean.
    """

    title: ClassVar[str] = "what TSV-M merges, under a mask learned on unlabeled images"
    paper: ClassVar[str] = (
        "FusionBench's concrete_tsvm; Tang et al., arXiv 2312.06173, and Gargiulo et al., arXiv 2412.00081"
    )
    published = ""
    also_called: ClassVar[Mapping[str, str]] = {"concrete_tsvm": "", "clip_concrete_tsvm": ""}
    gives_masks = False
    elementwise: ClassVar[bool] = False

    scaling_factor: Annotated[float, Range()] = 1.0
    """lambda."""
    weight_decay: Annotated[float, Range(0)] = 0.01
    """How strongly the logits are drawn to 0, as a share of `learning_rate` a step."""
    position_embedding: PositionEmbedding = "table"
    """Whether the position embedding is a table of vectors, averaged like other tensors, or a matrix."""

    @property
    def decay(self) -> float:
        return self.weight_decay

    def prepared(self, group: Group, surveyed: Mapping[str, Tensor], /) -> Tensor:
        del surveyed
        return self._unmasked(group)[None]

    def merge(self, group: Group, learned: LearnedTensors, /) -> Tensor:
        mask = final_mask(learned, group, self.mask, self.temperature)
        return self._unmasked(group).mul_(mask).add_(group.base)

    def _unmasked(self, group: Group) -> Tensor:
        """(...) the merged task vector."""
        merged = TsvM(scaling_factor=self.scaling_factor, position_embedding=self.position_embedding)
        return merged.merge(group).sub_(group.base)
