"""ACE-Merging: matrices averaged by the input covariances that the task vectors themselves suggest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._settings import Range
from mergecli.methods._svd import PositionEmbedding, decompose, gram, is_matrix

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-12


@dataclass(frozen=True)
class AceMerging(PerTensor):
    """theta = theta_0 + lambda M,  matrix by matrix:

    D_i = tau_i less the mean of its rows,  C_i = D_i^T D_i,  e = ridge
    M = (sum_i D_i (C_i + e I)) (sum_i (C_i + e I) + 1 c^T)^-1,  c the mean of the rows of sum_i C_i

    Where the tasks are heterogeneous, which is where the variance of log |tau_i|^2 over the square of its mean is
    above `heterogeneity`, C_i and e are divided by trace C_i, and c by the mean |tau_i|^2; and s U V^T is added to M,
    U S V^T the int(spectral_share r) largest singular triplets of
    M + sum_i tau_i (C_i - (1 / T) sum_j (C_j + e_j I)),  s the mean of S,  r the smaller side.

    Other tensors: theta = theta_0 + lambda (1 / T) sum_i tau_i. This is what the authors' program computes.
    Task vectors that are 0 are left out; in the authors' program they outweigh all others, since e is divided by their
    trace. Where the matrix cannot be inverted its pseudo-inverse takes its place, as there.
    """

    title: ClassVar[str] = "matrices averaged by input covariances estimated from the task vectors"
    paper: ClassVar[str] = "Xu et al., ACE-Merging, CVPR 2026, arXiv 2603.02945"
    work: ClassVar[str] = "a linear system for each matrix, in float64"
    elementwise: ClassVar[bool] = False

    scaling_factor: Annotated[float, Range()] = 1.0
    """lambda; 0 gives the base back."""
    ridge: Annotated[float, Range(0, open_low=True)] = 0.01
    """e, added to the diagonal of each covariance; a large one gives the average of the D_i."""
    heterogeneity: Annotated[float, Range(0)] = 0.3
    """Above which spread of the task vectors' norms covariances are normalized and the spectrum is refined."""
    spectral_share: Annotated[float, Range(0, 1)] = 0.3
    """Share of the singular directions that the refinement uses; 0 leaves it out."""
    position_embedding: PositionEmbedding = "table"
    """Whether the position embedding is a table of vectors, averaged like other tensors, or a matrix as in the
    authors' program."""

    def merge(self, group: Group, /) -> Tensor:
        deltas = group.deltas
        if not is_matrix(group, self.position_embedding) or not group.shape.numel():
            return total(deltas).mul_(self.scaling_factor / group.tasks).add_(group.base)
        return self._merged(deltas.double()).float().mul_(self.scaling_factor).add_(group.base)

    def _merged(self, deltas: Tensor) -> Tensor:
        """(O, I) M, in float64."""
        import torch

        squares = deltas.square().sum(dim=(1, 2))
        deltas, squares = deltas[squares > 0], squares[squares > 0]
        if not len(deltas):
            return deltas.new_zeros(deltas.shape[1:])
        logs = (squares + _TINY).log()
        spread = float(logs.var() / (logs.mean().square() + _TINY)) if len(deltas) > 1 else 0.0
        refine = spread > self.heterogeneity
        identity = torch.eye(deltas.shape[2], dtype=deltas.dtype, device=deltas.device)
        weighted, weights = torch.zeros_like(deltas[0]), torch.zeros_like(identity)
        bare = torch.zeros_like(identity)
        residual = torch.zeros_like(deltas[0])
        for delta in deltas:
            centered = delta - delta.mean(dim=0)
            covariance = gram(centered)
            scale = float(covariance.trace()) + _TINY if refine else 1.0
            covariance /= scale
            bare += covariance
            residual += delta @ covariance
            covariance += identity * (self.ridge / scale)
            weighted += centered @ covariance
            weights += covariance
        shared = bare.mean(dim=0) / (float(squares.mean()) + _TINY if refine else 1.0)
        merged, singular = torch.linalg.solve_ex(weights + shared, weighted, left=False)
        if int(singular):
            merged = weighted @ torch.linalg.pinv(weights + shared)
        count = int(min(merged.shape) * self.spectral_share)
        if refine and count:
            left, values, right = decompose(merged + residual - total(deltas) @ weights / len(deltas), count)
            merged += values.mean() * left @ right.T
        return merged
