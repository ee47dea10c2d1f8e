"""ACTMat and TACT: the least squares of RegMean, with the task vectors in place of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._kth_largest import largest_of
from mergecli.methods._normal_equation import NormalEquation
from mergecli.methods._settings import Fraction, Range
from mergecli.methods._svd import PositionEmbedding, is_matrix

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 2.0**-23
"""The rounding of float32, in which the published numbers were computed: their cut-off counts in it."""


@dataclass(frozen=True)
class ActMat(PerTensor):
    """theta = theta_0 + M,  matrix by matrix (O, I):

    M = (sum_i tau_i C_i) (sum_i C_i)^+,  C_i = t_i^T t_i,  t_i = tau_i where |tau_i| is among the largest `density` of
    the matrix, else 0

    A task vector's rows are sums of the inputs that made it, so that C_i stands in for the Gram matrix of the layer's
    inputs: RegMean without images. With a density of 1 this is ACTMat, with 0.5 TACT. There is no scaling factor. Other
    tensors: theta = theta_0 + (1 / T) sum_i tau_i.

    The pseudo-inverse leaves out eigenvalues up to max(O, I) 2^-23 of the largest, the cut-off of the authors' float32; all
    is computed in float64. Entries that tie with the smallest kept magnitude are kept.
    """

    title: ClassVar[str] = "least squares on the task vectors themselves, without images"
    paper: ClassVar[str] = "Hameed et al., ACTMat, COLM 2026, arXiv 2604.01329"
    published = "ACTMat (density {density})"
    work: ClassVar[str] = "an eigendecomposition of a square matrix for each matrix"
    elementwise: ClassVar[bool] = False

    density: Fraction = 1.0
    """Fraction of entries kept in t_i: 1 is ACTMat, 0.5 TACT. The authors chose among 0.1, 0.2, 0.3, 0.5 and 0.7."""
    cutoff: Annotated[float, Range(0)] = EPSILON
    """Eigenvalues up to max(O, I) times this share of the largest count as 0."""
    position_embedding: PositionEmbedding = "matrix"
    """Whether the position embedding is a table of vectors, averaged like other tensors, or a matrix as the authors
    have it."""

    def merge(self, group: Group, /) -> Tensor:
        deltas = group.deltas
        if not is_matrix(group, self.position_embedding):
            return total(deltas).div_(group.tasks).add_(group.base)
        equation = NormalEquation()
        for delta in deltas:
            equation.add(delta, largest_of(delta, round(self.density * delta.numel())))
        return equation.truncated(self.cutoff * max(group.shape, default=0)).float().add_(group.base)
