"""DC-Merge: task vectors merged in the directions of all tasks, each kept to a block of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._kth_largest import largest_of
from mergecli.methods._settings import Fraction, Range
from mergecli.methods._svd import PositionEmbedding, decompose, is_matrix, polar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DcMerge(PerTensor):
    """theta = theta_0 + lambda tau,  matrix by matrix (O, I), r the smaller side:

    tau_i = U_i S_i V_i^T, cut to its k = max(1, r // T) largest singular values, which may be smoothed
    U = P([U_1 ... U_T]),  V = P([V_1 ... V_T]),  P(X) = X (X^T X)^(-1/2), the nearest matrix with orthonormal columns
    M_i = U^T tau_i V, kept where |M_i| is among the largest `density` r^2 entries, at least one, else 0
    M = the mean of those M_i whose sign is sign(sum_i M_i), entry by entry, and 0 outside of the T blocks (k, k) of the
    diagonal
    tau = U M V^T

    Other tensors: tau = (1 / T) sum_i tau_i. Entries that tie with the smallest kept one are kept. P leaves out the
    directions in which X is 0; where T does not divide r the authors fill U and V up to r columns with arbitrary
    directions, which can win entries of M_i that the blocks then drop. The authors choose lambda from 0.1, 0.2 ... 3 on
    validation images, and smooth only LoRA adapters: their rank is 16 there, `smoothing = "mean"` or "linear".
    """

    title: ClassVar[str] = "task vectors merged in shared orthogonal directions, a block a task"
    paper: ClassVar[str] = "Zhang et al., DC-Merge, CVPR 2026, arXiv 2603.06242"
    published = "DC-Merge"
    work: ClassVar[str] = (
        "a singular value decomposition of each matrix of each model, and two of what they make"
    )
    elementwise: ClassVar[bool] = False

    scaling_factor: Annotated[float, Range()] = 1.0
    """lambda; 0 gives the base back."""
    density: Fraction = 1e-3
    """Entries kept of each M_i, as a share of r^2; 1 keeps all."""
    rank: Annotated[int, Range(0)] = 0
    """k, singular values kept of each task; 0 is r // T. At most r."""
    smoothing: Literal["none", "mean", "linear"] = "none"
    """What becomes of the kept singular values: nothing, each their mean, or a straight line with their sum."""
    steepness: Annotated[float, Range(1)] = 5.0
    """Of `smoothing = "linear"`: how many times the last singular value the first one is at most."""
    fuse_qkv: bool = True
    """Whether queries, keys and values of a layer are one matrix, as the authors have it, or three."""
    position_embedding: PositionEmbedding = "matrix"
    """Whether the position embedding is a table of vectors, averaged like other tensors, or a matrix as the authors
    have it."""

    @property
    def fuses(self) -> bool:
        return self.fuse_qkv

    def merge(self, group: Group, /) -> Tensor:
        import torch

        deltas = group.deltas
        if not is_matrix(group, self.position_embedding):
            return total(deltas).mul_(self.scaling_factor / group.tasks).add_(group.base)
        size = min(group.shape)
        rank = min(self.rank, size) if self.rank else max(1, size // group.tasks)
        parts = [decompose(delta, rank) for delta in deltas]
        left = polar(torch.cat([u for u, _, _ in parts], dim=1))[0]
        right = polar(torch.cat([v for _, _, v in parts], dim=1))[0]
        summed = left.new_zeros(left.shape[1], right.shape[1])
        kept: list[Tensor] = []
        for u, values, v in parts:
            core = (left.T @ u) * self._smoothed(values) @ (v.T @ right)
            core = largest_of(core, int(self.density * size * size))
            summed += core
            kept.append(core)
        signs = summed.sign_()
        added, count = torch.zeros_like(signs), torch.zeros_like(signs)
        for core in kept:
            agrees = core.sign().eq_(signs).mul_(signs.abs())
            added += core * agrees
            count += agrees
        core = added.div_(count.clamp_(min=1))
        blocks = torch.arange(len(core), device=core.device) // max(1, rank)
        core.mul_(blocks[:, None] == blocks)
        return (left @ core @ right.T).float().mul_(self.scaling_factor).add_(group.base)

    def _smoothed(self, values: Tensor) -> Tensor:
        """(k,) the singular values, largest first, made more alike; those that are 0 stay 0."""
        import torch

        present = values[values > 0]
        if self.smoothing == "none" or not len(present):
            return values
        steep = min(self.steepness, float(present[0] / present[-1])) if self.smoothing == "linear" else 1.0
        weights = torch.linspace(steep, 1.0, len(present), dtype=values.dtype, device=values.device)
        smooth = torch.zeros_like(values)
        smooth[: len(present)] = present.sum() * weights / weights.sum()
        return smooth
