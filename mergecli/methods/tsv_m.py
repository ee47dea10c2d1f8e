"""TSV-M: the leading singular vectors of all tasks, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._settings import Range
from mergecli.methods._svd import PositionEmbedding, decompose, is_matrix, polar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TsvM(PerTensor):
    """theta = theta_0 + lambda tau,  matrix by matrix:

    tau_i = U_i S_i V_i^T, cut to its k = max(1, r // T) largest singular values, r the smaller side
    U = [U_1 ... U_T], V = [V_1 ... V_T], S = diag(S_1 ... S_T)
    tau = P(U) S P(V)^T,  P(X) = X (X^T X)^(-1/2), the nearest matrix with orthonormal columns

    Other tensors: tau = (1 / T) sum_i tau_i. P leaves out the directions in which X is 0 (singular values up to 1e-6 of
    the largest), so that tasks equal to the base and repeated tasks change nothing. FusionBench fills them up with
    whatever vectors the decomposition returns, and takes k = 0, that is tau = 0, where r is smaller than T.
    """

    title: ClassVar[str] = "the leading singular vectors of all tasks, made orthogonal to each other"
    paper: ClassVar[str] = "Gargiulo et al., Task singular vectors, CVPR 2025, arXiv 2412.00081, algorithm 1"
    published = "TSV-M"
    also_called: ClassVar[Mapping[str, str]] = {"tsvm": "", "task_singular_vector": ""}
    work: ClassVar[str] = (
        "a singular value decomposition of each matrix of each model, and two of what they make"
    )
    elementwise: ClassVar[bool] = False

    scaling_factor: Annotated[float, Range()] = 1.0
    """lambda; 0 gives the base back."""
    position_embedding: PositionEmbedding = "table"
    """Whether the position embedding is a table of vectors, averaged like other tensors, or a matrix as in
    FusionBench."""

    def merge(self, group: Group, /) -> Tensor:
        import torch

        deltas = group.deltas
        if not is_matrix(group, self.position_embedding):
            return total(deltas).mul_(self.scaling_factor / group.tasks).add_(group.base)
        rank = max(1, min(group.shape) // group.tasks)
        parts = [decompose(delta, rank) for delta in deltas]
        left = torch.cat([u for u, _, _ in parts], dim=1)
        right = torch.cat([v for _, _, v in parts], dim=1)
        values = torch.cat([s for _, s, _ in parts])
        merged = ((polar(left)[0] * values) @ polar(right)[0].T).float()
        return merged.mul_(self.scaling_factor).add_(group.base)
