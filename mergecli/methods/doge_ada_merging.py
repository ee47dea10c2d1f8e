"""DOGE on AdaMerging: coefficients learned for task vectors that are corrected and trimmed as DOGE does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group, Groups
from mergecli.methods._coefficients import CoefficientLearner
from mergecli.methods._doge import as_matrices, corrections, is_layer_weight, scales, thresholds
from mergecli.methods._learned import State
from mergecli.methods._settings import Fraction, Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DogeAdaMerging(CoefficientLearner):
    """theta = theta_0 + sum_i c_i m_i (tau_i + d_i),  for each weight matrix of the layers:

    m_i = 1 on the largest `density` of the entries of task i's matrices together, else 0
    d_i minimize  sum_j sum_rows (sum_columns tau_j (tau_j - sum_i l_i tau_i - sum_i l_i d_i))^2  by Adam from 0, each
        gradient g replaced by g - B B^T g,  l_i = `correction_scale` / |tau_i|,  B the r // T leading left singular
        vectors of [U_1 ... U_T],  U_i the r // T (at least 1) leading ones of tau_i,  r the smaller side
    c_i from `start` minimize  sum_t mean_x H(softmax(logits_t(x; theta)))  as in AdaMerging, one for each task and matrix

    All other tensors are the base's: embeddings, norms, biases, and what lies outside of the layers. `doge_ta` has one d
    for all tasks, leaves fewer directions alone, and takes the l_i in place of learned coefficients. The gradient of d_i is
    l_i times the same matrix for all i, and Adam does not see the size of gradients: so the d_i are equal, but where
    gradients are as small as Adam's 1e-8. FusionBench's m_i has one entry more.
    """

    title: ClassVar[str] = "coefficients learned on unlabeled images, of task vectors that DOGE has corrected"
    paper: ClassVar[str] = "Wei et al., Adaptive projective gradient descent, ICML 2025, arXiv 2501.01230"
    also_called: ClassVar[Mapping[str, str]] = {"doge_am": "", "doge_layer_wise_adamerging": ""}
    work: ClassVar[str] = (
        f"`correction_steps` products for each matrix, once to learn and once to merge; {CoefficientLearner.work}"
    )
    elementwise: ClassVar[bool] = False

    density: Fraction = 0.3
    """Fraction of entries kept of each task's matrices; 1 keeps all."""
    correction_steps: Annotated[int, Range(0)] = 400
    """Steps of Adam for the corrections of each matrix; 0 makes none."""
    correction_rate: Annotated[float, Range(0)] = 1e-4
    """About how far each entry of a correction moves in a step."""
    correction_scale: Annotated[float, Range(0)] = 0.07
    """How large the task vectors are taken to be while they are corrected: the norm of each matrix."""

    @property
    def keeps_projection(self) -> bool:
        return True

    def survey(self, groups: Groups, /) -> State:
        import torch

        least = thresholds(groups, self.density)  # infinity where nothing is kept
        return {"thresholds": least.clamp_(max=torch.finfo(torch.float32).max)}

    def prepared(self, group: Group, surveyed: Mapping[str, Tensor], /) -> Tensor:
        if not is_layer_weight(group.name) or not group.shape.numel():
            return group.deltas.zero_()
        deltas = as_matrices(group)  # (T, O, I)
        dropped = deltas.abs() < surveyed["thresholds"].to(deltas.device).view(-1, 1, 1)
        if self.correction_steps:
            deltas = deltas + corrections(
                deltas,
                scales(deltas, self.correction_scale),
                directions=min(deltas.shape[1:]) // len(deltas),
                steps=self.correction_steps,
                learning_rate=self.correction_rate,
                shared=False,
            )
        return deltas.masked_fill_(dropped, 0).view(group.tasks, *group.shape)

    def file_shapes(
        self, tasks: int, tensors: Mapping[str, tuple[int, ...]], /
    ) -> dict[str, tuple[int, ...]]:
        return super().file_shapes(tasks, tensors) | {"thresholds": (tasks,)}
