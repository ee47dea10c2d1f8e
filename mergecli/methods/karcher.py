"""The Karcher mean of several checkpoints on the sphere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group, PerTensor
from mergecli.methods._cosine import cosines, inner_products
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1e-12
_NEAR = 1e-6
_DEPENDENT = 1e-13
"""Eigenvalues of the cosines up to this share of the largest are rounding errors: the vectors are dependent."""
_CANCELLED = 1e-4
"""Unit vectors whose mean is shorter, and angles that lack less to a half turn, are taken to cancel: what is left of
them is mostly rounding errors."""


@dataclass(frozen=True)
class Karcher(PerTensor):
    """theta = r u,  per tensor, as one long vector:

    r = (1 / T) sum_i |theta_i|, the mean norm
    u = the point of the unit sphere whose summed squared angles to the theta_i / |theta_i| are least

    u is found by steps u <- exp_u((1 / T) sum_i log_u(theta_i / |theta_i|)) from the normalized mean, or from the
    first model where that mean is 0 (shorter than 1e-4). Tensors that are 0 have no direction, but count in the mean
    norm; of a point opposite to u (to 1e-4) no direction is taken. The base is not needed; the order of tasks matters
    only to the last bits.
    """

    title: ClassVar[str] = "the mean direction on the sphere, with the mean norm, tensor by tensor"
    paper: ClassVar[str] = (
        "Karcher, Riemannian center of mass, CPAM 1977; for models: Goddard et al., MergeKit, EMNLP 2024, "
        "arXiv 2403.13257"
    )
    also_called: ClassVar[Mapping[str, str]] = {"multislerp": ""}
    work: ClassVar[str] = "up to `steps` rounds over each tensor"
    needs_base: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False

    steps: Annotated[int, Range(0)] = 100
    """The most steps taken; they end when u no longer moves. 0 is the normalized mean of the directions."""

    def merge(self, group: Group, /) -> Tensor:
        import torch

        tuned = group.tuned
        products = inner_products(tuned)
        norms = products.diagonal().sqrt()
        direct = norms > 0
        if not bool(direct.any()):
            return torch.zeros_like(tuned[0])
        weights = self._weights(cosines(products), direct) * (norms.mean() / norms).masked_fill_(~direct, 0)
        # in float64, since the weights of directions that nearly cancel are large
        mean = torch.zeros_like(tuned[0], dtype=torch.float64)
        for row, weight in zip(tuned, weights.tolist(), strict=True):
            mean.add_(row, alpha=weight)
        return mean.float()

    def _weights(self, cosine: Tensor, direct: Tensor) -> Tensor:
        """(T,) weights of the unit vectors in the mean, which is a combination of them: only their cosines matter.

        Of vectors that depend on each other many combinations are the same; without taking the one of smallest weights
        the others would grow from step to step.
        """
        import torch

        count = direct.sum()
        smallest = torch.linalg.pinv(cosine, rtol=_DEPENDENT, hermitian=True) @ cosine
        weights = direct.double() / count
        norm = (weights @ cosine @ weights).clamp(min=0).sqrt()
        if norm < _CANCELLED:
            weights = torch.zeros_like(weights)
            weights[int(direct.int().argmax())] = 1
        else:
            weights /= norm
        for _ in range(self.steps):
            near = (cosine @ weights).clamp(-1, 1)
            angle = near.acos()
            stretch = torch.where(angle < _NEAR, 1, angle / angle.sin())
            stretch = stretch.masked_fill(~direct | (angle > torch.pi - _CANCELLED), 0) / count
            tangent = stretch - (stretch * near).sum() * weights
            length = (tangent @ cosine @ tangent).clamp(min=0).sqrt()
            if length < _SMALL:
                break
            weights = smallest @ (length.cos() * weights + length.sin() * tangent / length)
            weights /= (weights @ cosine @ weights).sqrt()
        return weights
