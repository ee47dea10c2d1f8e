"""What DOGE does to the weight matrices of layers: a threshold, and corrections outside of the tasks' common directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergecli.methods._adam import adam
from mergecli.methods._base import Group, Groups, total
from mergecli.methods._depth import layer_of
from mergecli.methods._kth_largest import Rank, kth_largest
from mergecli.methods._svd import decompose

if TYPE_CHECKING:
    from torch import Tensor


def is_layer_weight(name: str) -> bool:
    """Whether a tensor is one of those that are merged."""
    return layer_of(name) is not None and name.endswith("weight") and "norm" not in name and "ln_" not in name


def thresholds(groups: Groups, density: float) -> Tensor:
    """(T,) the smallest magnitude kept of each task, of all its matrices together."""

    def entries(group: Group) -> Tensor:
        magnitudes = group.deltas.abs_().reshape(group.tasks, -1)
        return magnitudes if is_layer_weight(group.name) else magnitudes[:, :0]

    return kth_largest(groups, [Rank(density, lambda count: int(count * density))], entries)[0]


def as_matrices(group: Group) -> Tensor:
    """(T, O, I) the task vectors of a tensor; those of a vector have one row."""
    rows = len(group.base) if group.base.dim() > 1 else 1
    return group.deltas.view(group.tasks, rows, -1)


def scales(deltas: Tensor, scaling_factor: float) -> Tensor:
    """(T,) lambda / |tau_i|, 0 where a task vector is 0."""
    import torch

    norms = torch.linalg.vector_norm(deltas, dim=(1, 2), dtype=torch.float64)
    return (scaling_factor / norms).masked_fill_(norms == 0, 0).float()


def corrections(
    deltas: Tensor, scales: Tensor, *, directions: int, steps: int, learning_rate: float, shared: bool
) -> Tensor:
    """(T, O, I) or, where all tasks share one, (1, O, I) what is added to (T, O, I) task vectors of a matrix.

    They minimize  sum_j sum_rows (sum_columns tau_j (tau_j - sum_i l_i tau_i - sum_i l_i d_i))^2  by Adam from 0, without
    what lies in the leading `directions` that the tasks have in common.

    Args:
        scales: (T,) the l_i.
    """
    import torch

    size = min(deltas.shape[1:])
    leading = [decompose(delta, max(1, size // len(deltas)))[0] for delta in deltas]
    kept = decompose(torch.cat(leading, dim=1), directions)[0].float()  # (O, k)
    together = float(scales.double().sum())
    # with D = together sum_i r_i d_i, of which the loss is a function, the gradient of d_i is r_i times that of one for all
    shares = torch.ones(1) if shared else scales / together if together else torch.zeros_like(scales)
    shares = shares.to(deltas).view(-1, 1, 1)
    summed = total(deltas * scales.view(-1, 1, 1))
    missing = torch.linalg.vecdot(deltas, deltas - summed)  # (T, O)
    by_row = deltas.transpose(0, 1).contiguous()  # (O, T, I)

    def gradient(at: Tensor) -> Tensor:
        mixed = total(at * shares).unsqueeze(2)
        left = missing.T.unsqueeze(2) - together * (by_row @ mixed)  # (O, T, 1)
        own = (left.transpose(1, 2) @ by_row).squeeze(1).mul_(-2 * together)  # (O, I)
        return (own - kept @ (kept.T @ own)) * shares

    start = torch.zeros(len(shares), *summed.shape, device=deltas.device)
    return adam(start, gradient, learning_rate, steps)
