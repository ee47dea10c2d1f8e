"""Some eigenvectors of a symmetric matrix: all of them in float32, those that are wanted mended in float64.

LAPACK finds all eigenvectors of a matrix or none. In float32 it takes less than half the time, and what the vectors miss
is of the first order in the rounding: one correction by all others makes it second-order.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from mergecli.methods._svd import gram

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 512
"""Of smaller matrices all eigenvectors in float64 take no longer."""

ROUNDS = 3
"""Corrections before giving up; one is enough for most spectra."""

EXACT = 1e-8
"""The largest angle between the space that is found and that of the eigenvectors, a sixth of float32's rounding."""


class Eigenspace(NamedTuple):
    """(k,) eigenvalues, the outermost first, (n, k) orthonormal eigenvectors, and the eigenvalue that comes next."""

    values: Tensor
    vectors: Tensor
    following: float


class Eigenspaces:
    """The eigenvectors at either end of a symmetric (n, n) float64 matrix C whose eigenvalues are at least 0."""

    def __init__(self, square: Tensor) -> None:
        import torch

        self._square = square
        self._scale = float(square.diagonal().max())  # float32 has no room for all that float64 has
        values, self._vectors = torch.linalg.eigh((square / self._scale).float())
        self.values = values.double().mul_(self._scale)
        """(n,) eigenvalues, smallest first, each nearer than `error` to the true one of its place."""
        self._largest = float(self.values[-1])
        # LAPACK's error is a few roundings of the largest eigenvalue, which grow more slowly than this
        self.error = math.sqrt(len(square)) * 2.0**-23 * self._largest

    def largest(self, count: int) -> Eigenspace | None:
        """The eigenvectors of the `count` largest eigenvalues; None where it is not sure that these are found, or not soon."""
        return self._at_an_end(count, self.values.flip(0), self._vectors.flip(1), -1)

    def smallest(self, count: int) -> Eigenspace | None:
        """The same of the smallest."""
        return self._at_an_end(count, self.values, self._vectors, 1)

    def _at_an_end(self, count: int, values: Tensor, vectors: Tensor, sign: int) -> Eigenspace | None:
        import torch

        # Vectors beside the wanted ones are mended too: float32 mixes up neighbors, and among those at hand they are told
        # apart in float64. What is then missed of the wanted ones lies far from them.
        width = with_spare(count, len(values))
        if not 0 < count < width < len(values):
            return None
        rest, others = vectors[:, width:], values[width:]
        basis, found = vectors[:, :width].double(), values[:width]
        image, lost = self._square @ basis, self.error
        for _ in range(ROUNDS):
            # (C - v) (q + rest x) is orthogonal to the rest where x = rest^T (C - v) q / (v - others), up to second orders.
            # Across the end of those at hand neighbors may stay mixed up.
            missing = (rest.T @ (image - basis * found).div_(self._scale).float()).double().mul_(self._scale)
            apart = found - others[:, None]
            steps = (missing / apart).masked_fill_(apart.abs() < self.error, 0)
            lost += float(missing.norm() * steps.norm())
            basis += rest @ steps.float()
            factor, failed = torch.linalg.cholesky_ex(gram(basis))
            if int(failed):
                return None
            basis = torch.linalg.solve_triangular(factor, basis.T, upper=False).T
            image = self._square @ basis
            found, turned = torch.linalg.eigh((basis.T @ image).mul_(sign))
            found, basis, image = found.mul_(sign), basis @ turned, image @ turned
            # All that is orthogonal to the basis has eigenvalues beyond `others`, less `lost`. By Davis and Kahan the angle is
            # at most what C adds to the wanted vectors over the distance to these, and its square over that to the next one.
            last, following = float(found[count - 1]), float(found[count])
            distance = sign * (float(others[0]) - last) - lost
            if not distance > 0:
                return None
            rounding = math.sqrt(len(values)) * 2.0**-52 * self._largest
            missed = float((image[:, :count] - basis[:, :count] * found[:count]).norm())
            if missed <= max(EXACT * distance, rounding):
                if missed**2 / distance + rounding > 100 * EXACT * abs(following - last):
                    return None
                return Eigenspace(found[:count], basis[:, :count], following)
        return None


def with_spare(count: int, size: int) -> int:
    """How many eigenvectors of a matrix of this size are mended for so many."""
    return count + max(32, size // 16)
