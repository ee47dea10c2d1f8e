"""WUDI: the merged task vector that interferes least with the tasks' own inputs, found by descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._adam import adam
from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._settings import Range
from mergecli.methods._svd import PositionEmbedding, gram, is_matrix

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Wudi(PerTensor):
    """theta = theta_0 + M,  matrix by matrix:  M minimizes  sum_i |(M - tau_i) tau_i^T|^2 / |tau_i|^2

    by `steps` steps of Adam from sum_i tau_i, which is not the minimum. The gradient is 2 (M C - B) with
    C = sum_i tau_i^T tau_i / |tau_i|^2 and B = sum_i tau_i tau_i^T tau_i / |tau_i|^2, so that a step costs one product
    whatever the number of tasks. Task vectors that are 0 are left out of the sum.

    Other tensors: theta = theta_0 + (1 / T) sum_i tau_i. The paper takes 300 steps, FusionBench's recipe 400.
    """

    title: ClassVar[str] = "the merged task vector that interferes least with each task's inputs"
    paper: ClassVar[str] = (
        "Cheng et al., Whoever started the interference should end it, ICML 2025, arXiv 2503.08099"
    )
    work: ClassVar[str] = "`steps` products of square matrices for each matrix"
    elementwise: ClassVar[bool] = False

    steps: Annotated[int, Range(0)] = 400
    """Steps of Adam; 0 is task arithmetic with a scaling factor of 1 on the matrices."""
    learning_rate: Annotated[float, Range(0)] = 1e-5
    """About how far each entry moves in a step."""
    position_embedding: PositionEmbedding = "table"
    """Whether the position embedding is a table of vectors, averaged like other tensors, or a matrix as in
    FusionBench."""

    def merge(self, group: Group, /) -> Tensor:
        import torch

        deltas = group.deltas
        merged = total(deltas)
        if not is_matrix(group, self.position_embedding):
            return merged.div_(group.tasks).add_(group.base)
        weights = torch.zeros(group.shape[1], group.shape[1], device=merged.device)
        wanted = torch.zeros_like(merged)
        for delta in deltas:
            square = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
            if square:
                inputs = gram(delta).mul_(2 / square)
                weights += inputs
                wanted += delta @ inputs
        room = torch.empty_like(merged)

        def gradient(at: Tensor) -> Tensor:
            return torch.mm(at, weights, out=room).sub_(wanted)

        return adam(merged, gradient, self.learning_rate, self.steps).add_(group.base)
