"""DOGE-TA: task arithmetic with a shared correction, found by descent outside of the tasks' common directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._adam import adam
from mergecli.methods._base import Group, Groups, TwoPass, total
from mergecli.methods._depth import layer_of
from mergecli.methods._kth_largest import Rank, kth_largest
from mergecli.methods._settings import Fraction, Range
from mergecli.methods._svd import decompose

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

    def survey(self, groups: Groups, /) -> Tensor:
        """(T,) the smallest magnitude kept of each task."""

        def entries(group: Group) -> Tensor:
            magnitudes = group.deltas.abs_().reshape(group.tasks, -1)
            return magnitudes if _is_layer_weight(group.name) else magnitudes[:, :0]

        return kth_largest(groups, [Rank(self.density, lambda count: int(count * self.density))], entries)[0]

    def merge(self, group: Group, surveyed: Tensor, /) -> Tensor:
        import torch

        if not _is_layer_weight(group.name) or not group.shape.numel():
            return group.base.clone()
        rows = len(group.base) if group.base.dim() > 1 else 1
        deltas = group.deltas.view(group.tasks, rows, -1)  # (T, O, I)
        norms = torch.linalg.vector_norm(deltas, dim=(1, 2), dtype=torch.float64)
        scales = (self.scaling_factor / norms).masked_fill_(norms == 0, 0).float()
        correction = self._correction(deltas, scales)
        merged = torch.zeros_like(correction)
        for row, scale, threshold in zip(deltas, scales, surveyed.tolist(), strict=True):
            dropped = row.abs() < threshold
            merged += (row + correction).masked_fill_(dropped, 0).mul_(scale)
        return merged.view(group.shape).add_(group.base)

    def _correction(self, deltas: Tensor, scales: Tensor) -> Tensor:
        """(O, I) what is added to every task vector of a matrix."""
        import torch

        size = min(deltas.shape[1:])
        leading = [decompose(delta, max(1, size // len(deltas)))[0] for delta in deltas]
        kept = decompose(torch.cat(leading, dim=1), size // self.subspace_divisor)[0].float()  # (O, k)
        together = float(scales.double().sum())
        summed = total(deltas * scales.view(-1, 1, 1))
        missing = torch.linalg.vecdot(deltas, deltas - summed)  # (T, O)
        by_row = deltas.transpose(0, 1).contiguous()  # (O, T, I)

        def gradient(at: Tensor) -> Tensor:
            left = missing.T.unsqueeze(2) - together * (by_row @ at.unsqueeze(2))  # (O, T, 1)
            own = (left.transpose(1, 2) @ by_row).squeeze(1).mul_(-2 * together)  # (O, I)
            return own - kept @ (kept.T @ own)

        return adam(torch.zeros_like(summed), gradient, self.learning_rate, self.steps)


def _is_layer_weight(name: str) -> bool:
    return layer_of(name) is not None and name.endswith("weight") and "norm" not in name and "ln_" not in name
