"""SVC: singular values of a merged matrix lowered where the tasks overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from mergecli.methods._base import Group, Method
from mergecli.methods._modifier import Modifier
from mergecli.methods._settings import Range
from mergecli.methods._svd import PositionEmbedding, decompose, is_matrix
from mergecli.methods.task_arithmetic import TaskArithmetic

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Svc(Modifier):
    """theta = theta_0 + U G S V^T,  matrix by matrix:  theta' - theta_0 = U S V^T,  theta' what `of` merges

    G = diag(g_r),  g_r = T / sum_i max(alpha, s_ri),  s_ri = <u_r^T D, u_r^T tau_i> / |u_r^T tau_i|^2,  D = U S V^T

    All in float64. Other tensors are left as they were merged. Where |u_r^T tau_i|^2 is below 1e-12, that takes its
    place. FusionBench's recipes take alpha 0.1 (task arithmetic, TIES, DARE, Iso-C, average), 0.2 (Iso-CTS) or
    1 (TSV-M, WUDI), and a scaling factor of 1.5 for Iso.
    """

    title: ClassVar[str] = "singular values of what another method merges lowered where tasks overlap"
    paper: ClassVar[str] = "Singular value calibration, 2026, arXiv 2602.05536"
    work: ClassVar[str] = "a singular value decomposition of each matrix, in float64"
    elementwise: ClassVar[bool] = False
    keeps_group: ClassVar[bool] = True

    of: Method = TaskArithmetic()  # noqa: RUF009
    """The method whose merged matrices are calibrated."""
    least_overlap: Annotated[float, Range(0, open_low=True)] = 0.1
    """alpha, the least overlap that counts: no singular value is raised more than 1 / alpha times."""
    position_embedding: PositionEmbedding = "table"
    """Whether the position embedding is a table of vectors, left as it was merged, or a matrix as in FusionBench."""

    def after(self, group: Group, merged: Tensor, surveyed: Any, /) -> Tensor:
        import torch

        del surveyed
        if not is_matrix(group, self.position_embedding):
            return merged
        left, values, right = decompose(merged.double() - group.base.double())
        difference = right * values  # (I, r) transposed: a column is u_r^T D
        overlap = torch.zeros_like(values)
        for delta in group.deltas:
            own = delta.double().T @ left  # (I, r)
            along = (difference * own).sum(0) / own.square().sum(0).clamp_(min=1e-12)
            overlap += along.clamp_(min=self.least_overlap)
        values *= group.tasks / overlap
        return ((left * values) @ right.T).float().add_(group.base)
