"""Iso-CTS: common and task-specific directions, orthogonal to each other, with equal singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._settings import Range
from mergecli.methods._svd import PositionEmbedding, decompose, is_matrix, polar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class IsoCts(PerTensor):
    """theta = theta_0 + lambda s P(U) P(V)^T,  matrix by matrix, r the smaller side:

    common  U_c, S_c, V_c: the r - T n largest singular triplets of sum_i tau_i,  n = round((r - int(common_space r)) / T)
    task i  U_i, S_i, V_i: the n largest of tau_i - U_c U_c^T tau_i
    U = [U_1 ... U_T U_c], V = [V_1 ... V_T V_c],  s the mean of all S,  P(X) = X (X^T X)^(-1/2)

    Other tensors: theta = theta_0 + lambda (1 / T) sum_i tau_i. Singular values up to 1e-6 of the largest count as 0,
    and their vectors are left out; FusionBench keeps them, whatever the decomposition returns. n is at most r / T.
    """

    title: ClassVar[str] = "common and task-specific directions with equal singular values"
    paper: ClassVar[str] = "Marczak et al., No task left behind, ICML 2025, arXiv 2502.04959, algorithm 2"
    published = "Iso-CTS"
    work: ClassVar[str] = (
        "a singular value decomposition of each matrix of each model, and three of what they make"
    )
    elementwise: ClassVar[bool] = False

    scaling_factor: Annotated[float, Range()] = 1.0
    """lambda; 0 gives the base back."""
    common_space: Annotated[float, Range(0, 1)] = 0.8
    """Share of the directions taken from the summed task vector; 1 is Iso-C."""
    position_embedding: PositionEmbedding = "table"
    """Whether the position embedding is a table of vectors, averaged like other tensors, or a matrix as in
    FusionBench."""

    def merge(self, group: Group, /) -> Tensor:
        import torch

        deltas = group.deltas
        summed = total(deltas)
        if not is_matrix(group, self.position_embedding):
            return summed.mul_(self.scaling_factor / group.tasks).add_(group.base)
        size = min(group.shape)
        own = min(round((size - int(size * self.common_space)) / group.tasks), size // group.tasks)
        common = decompose(summed, size - own * group.tasks)

        def specific(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            wide = delta.double()
            return decompose(wide - common[0] @ (common[0].T @ wide), own)

        parts = [*map(specific, deltas), common]
        values = torch.cat([s for _, s, _ in parts])
        left = polar(torch.cat([u for u, _, _ in parts], dim=1))[0]
        right = polar(torch.cat([v for _, _, v in parts], dim=1))[0]
        mean = values.mean() if len(values) else 0.0
        return (left @ right.T).mul_(mean).float().mul_(self.scaling_factor).add_(group.base)
