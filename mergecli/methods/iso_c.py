"""Iso-C: the summed task vector with all its singular values made equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._settings import Range
from mergecli.methods._svd import PositionEmbedding, is_matrix, polar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class IsoC(PerTensor):
    """theta = theta_0 + lambda s U V^T,  matrix by matrix:  sum_i tau_i = U S V^T,  s the mean of S

    Other tensors: theta = theta_0 + lambda (1 / T) sum_i tau_i. Singular values up to 1e-6 of the largest count as 0
    in the mean, and their vectors are left out; FusionBench keeps them, whatever the decomposition returns.
    """

    title: ClassVar[str] = "the summed task vector with all its singular values made equal"
    paper: ClassVar[str] = "Marczak et al., No task left behind, ICML 2025, arXiv 2502.04959, algorithm 1"
    published = "Iso-C"
    also_called: ClassVar[Mapping[str, str]] = {"isotropic": ""}
    work: ClassVar[str] = "a singular value decomposition of each matrix"
    elementwise: ClassVar[bool] = False

    scaling_factor: Annotated[float, Range()] = 1.0
    """lambda; 0 gives the base back."""
    position_embedding: PositionEmbedding = "table"
    """Whether the position embedding is a table of vectors, averaged like other tensors, or a matrix as in
    FusionBench."""

    @property
    def against_adapters(self) -> str:
        return (
            "`iso_c` of adapters is published below their mean (LoRA of ViT-B/32: 50.4 against 56.8): s is the mean over all "
            'singular values of a weight, of which adapters leave most at 0; `space = "core"` has none of these'
        )

    def merge(self, group: Group, /) -> Tensor:
        summed = total(group.deltas)
        if not is_matrix(group, self.position_embedding):
            return summed.mul_(self.scaling_factor / group.tasks).add_(group.base)
        factor, values = polar(summed)
        mean = values.mean() if len(values) else 0.0
        return (factor * mean).float().mul_(self.scaling_factor).add_(group.base)
