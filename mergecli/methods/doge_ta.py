"""DOGE-TA: task arithmetic with a shared correction, found by descent outside of the tasks' common directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group, Groups, TwoPass
from mergecli.methods._doge import as_matrices, corrections, is_layer_weight, scales, thresholds
from mergecli.methods._settings import Fraction, Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DogeTa(TwoPass):
    """theta = theta_0 + sum_i l_i m_i (tau_i + d),  for each weight matrix of the layers:

    l_i = lambda / |tau_i|
    m_i = 1 on the largest `density` of the entries of task i's matrices together, else 0
    d   minimizes  sum_j sum_rows (sum_columns tau_j (tau_j - sum_i l_i tau_i - d sum_i l_i))^2  by Adam from 0, each
        gradient g replaced by g - B B^T g,  B the leading left singular vectors of [U_1 ... U_T],
        U_i the leading r // T (at least 1) left singular vectors of tau_i,  r the smaller side

    All other tensors are the base's: embeddings, norms, biases, and what lies outside of the layers. With one task the
    leading directions B are not unique. Where a task vector is 0, so is its l_i. FusionBench's m_i has one entry more.
    """

    title: ClassVar[str] = (
        "task arithmetic on trimmed task vectors, with a shared correction found by descent"
    )
    paper: ClassVar[str] = "Wei et al., Adaptive projective gradient descent, ICML 2025, arXiv 2501.01230"
    also_called: ClassVar[Mapping[str, str]] = {"doge": ""}
    work: ClassVar[str] = "`steps` products for each matrix"
    elementwise: ClassVar[bool] = False

    scaling_factor: Annotated[float, Range()] = 0.07
    """lambda, before it is divided by the norm of each matrix; 0 gives the base back."""
    density: Fraction = 0.3
    """Fraction of entries kept of each task's matrices; 1 keeps all."""
    subspace_divisor: Annotated[int, Range(1)] = 6
    """The correction leaves r // subspace_divisor directions alone; 1 leaves all, a large one none."""
    steps: Annotated[int, Range(0)] = 400
    """Steps of Adam for each matrix; 0 makes no correction."""
    learning_rate: Annotated[float, Range(0)] = 1e-4
    """About how far each entry of the correction moves in a step."""

    @property
    def keeps_projection(self) -> bool:
        return True

    def survey(self, groups: Groups, /) -> Tensor:
        """(T,) the smallest magnitude kept of each task."""
        return thresholds(groups, self.density)

    def merge(self, group: Group, surveyed: Tensor, /) -> Tensor:
        import torch

        if not is_layer_weight(group.name) or not group.shape.numel():
            return group.base.clone()
        deltas = as_matrices(group)  # (T, O, I)
        each = scales(deltas, self.scaling_factor)
        directions = min(deltas.shape[1:]) // self.subspace_divisor
        correction = corrections(
            deltas,
            each,
            directions=directions,
            steps=self.steps,
            learning_rate=self.learning_rate,
            shared=True,
        )[0]
        merged = torch.zeros_like(correction)
        for row, scale, threshold in zip(deltas, each, surveyed.tolist(), strict=True):
            dropped = row.abs() < threshold
            merged += (row + correction).masked_fill_(dropped, 0).mul_(scale)
        return merged.view(group.shape).add_(group.base)
