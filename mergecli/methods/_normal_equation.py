"""The normal equation M C = D of methods that fit what task vectors give on some inputs, and its solutions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergecli.methods._eigenspace import LEAST, Eigenspaces, with_spare
from mergecli.methods._svd import blocks, gram

if TYPE_CHECKING:
    from torch import Tensor


MARGIN = 0.01
"""How much larger the largest eigenvalue may be than what a few multiplications find."""

MOST = 0.28
"""The share of its eigenvectors up to which a matrix's are sought apart from the others."""

STEEP, FLAT = 0.012, 0.3
"""(sum_k lambda_k)^2 / (n sum_k lambda_k^2), which costs nothing: between these about half of the n eigenvectors count, and to
seek them apart takes no less."""

CONDITION = 1e-8
"""The smallest eigenvalue, as a share of the largest, by which Cholesky factors divide closely enough."""


class NormalEquation:
    """C = sum_i w_i t_i^T t_i  (I, I)  and  D = sum_i w_i tau_i t_i^T t_i  (O, I), in float64, task by task."""

    def __init__(self) -> None:
        self._left: Tensor | None = None
        self._right: Tensor | None = None
        self._half = False

    def add(self, delta: Tensor, seen: Tensor | None = None, weight: float = 1.0) -> None:
        """Adds a task: its (O, I) task vector tau_i, and what stands for its inputs, t_i, by default the same."""
        wide = delta.double()
        inputs = wide if seen is None or seen is delta else seen.double()
        if len(inputs) >= inputs.shape[1]:
            squares = gram(inputs)
            self._add(squares, wide @ squares, weight)
            return
        # t^T t is as large as I squared: where the matrix is wide, (tau t^T) t costs less, and C is added up in its place, of
        # which only the upper half is computed
        if self._left is None or self._right is None:
            self._left, self._right = (
                wide.new_zeros(inputs.shape[1], inputs.shape[1]),
                wide.new_zeros(wide.shape),
            )
        for rows in blocks(len(self._left)):
            self._left[rows, rows.start :].addmm_(inputs[:, rows].T, inputs[:, rows.start :], alpha=weight)
        self._half = True
        self._right.addmm_(gram(wide.T) if inputs is wide else wide @ inputs.T, inputs, alpha=weight)

    def add_squares(self, delta: Tensor, squares: Tensor) -> None:
        """Adds a task by its (O, I) task vector and the (I, I) t_i^T t_i, both float64; the latter is overwritten."""
        self._add(squares, delta @ squares, 1.0)

    def _add(self, squares: Tensor, shown: Tensor, weight: float) -> None:
        if self._left is None or self._right is None:
            self._left, self._right = squares.mul_(weight), shown.mul_(weight)
        else:
            self._left.add_(squares, alpha=weight)
            self._right.add_(shown, alpha=weight)

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """C and D."""
        assert self._left is not None
        assert self._right is not None
        if self._half:
            for rows in blocks(len(self._left)):
                self._left[rows.stop :, rows] = self._left[rows, rows.stop :].T
            self._half = False
        return self._left, self._right

    def truncated(self, cutoff: float) -> Tensor:
        """(O, I) D C^+, without the eigenvalues up to `cutoff` of the largest."""
        if (solved := self._solved(cutoff)) is not None:
            return solved
        values, vectors = self._spectrum()
        kept = values > cutoff * values[-1:]
        vectors = vectors[:, kept]
        return ((self.sides[1] @ vectors) / values[kept]) @ vectors.T

    def _solved(self, cutoff: float) -> Tensor | None:
        """(O, I) D C^-1, where all eigenvalues are above `cutoff` of the largest; None where that is not sure.

        Why: C minus a multiple of the identity has a Cholesky factor where its eigenvalues are above it, and two factors
        take a twentieth of the time of all eigenvectors.
        """
        import torch

        left, right = self.sides
        if not left.numel():
            return None
        shifted = left.clone()
        shifted.diagonal().sub_(cutoff * (1 + MARGIN) * largest_eigenvalue(left))
        if int(torch.linalg.cholesky_ex(shifted).info):
            return None
        del shifted
        factor, failed = torch.linalg.cholesky_ex(left)
        return None if int(failed) else torch.cholesky_solve(right.T, factor).T

    def ridge(self, ridge: float) -> Tensor:
        """(O, I) D (C + ridge)^-1; D C^+ where that cannot be told from a division by 0."""
        import torch

        left, right = self.sides
        left = left.clone()
        left.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(left)
        if int(failed):
            return self.truncated(len(left) * torch.finfo(left.dtype).eps)
        return torch.cholesky_solve(right.T, factor).T

    def filtered(self, start: Tensor, rank: int | None, time: float) -> Tensor:
        """(O, I) M_0 + (D - M_0 C) Q diag(h / lambda) Q^T, C = Q diag(lambda) Q^T,  h_k = 1 - exp(-t lambda_k) for the `rank`
        largest eigenvalues and 0 for others; without a rank it is that of `participation`."""
        left, right = self.sides
        if math.isinf(time) and (cut := self._cut(start.double(), rank)) is not None:
            return cut
        values, vectors = self._spectrum()
        values, vectors = values.flip(0), vectors.flip(1)
        kept = participation(values) if rank is None else min(rank, len(values))
        values, vectors = values[:kept], vectors[:, :kept]
        resolved = values > len(left) * 2.0**-52 * values[:1]
        values, vectors = values[resolved], vectors[:, resolved]
        shares = -(-time * values).expm1()
        moved = (right - start.double() @ left) @ vectors
        return start.double() + (moved * (shares / values)) @ vectors.T

    def _cut(self, start: Tensor, rank: int | None) -> Tensor | None:
        """(O, I) `filtered` for a time without end, by the eigenvectors that are kept or those that are not, whichever are fewer;
        None where all eigenvectors take no longer, or where some cannot be told apart."""
        import torch

        left, right = self.sides
        size, total = len(left), float(left.diagonal().sum())
        if size < LEAST or not 0 < total < math.inf:
            return None
        if rank is None and STEEP < total**2 / size / float(left.norm()) ** 2 < FLAT:
            return None
        if rank is not None and with_spare(min(rank, size - rank), size) > size * MOST:
            return None
        spaces = Eigenspaces(left)
        if rank is None:
            least, most = (
                participation((spaces.values + error).clamp_(min=0), total)
                for error in (-spaces.error, spaces.error)
            )
            kept = least if least == most else participation(torch.linalg.eigvalsh(left).clamp_(min=0))
        else:
            kept = min(rank, size)
        if with_spare(min(kept, size - kept), size) > size * MOST:
            return None
        if 2 * kept <= size:
            if (found := spaces.largest(kept)) is None:
                return None
            values, vectors, _ = found
            return start + ((right @ vectors) / values - start @ vectors) @ vectors.T
        if (found := spaces.smallest(size - kept)) is None:
            return None
        del spaces
        _, vectors, following = found
        # raised in the directions that are left out, C has a good inverse, and the same one in the others
        largest = float(left.diagonal().max())
        factor, failed = torch.linalg.cholesky_ex(torch.addmm(left, vectors, vectors.T, alpha=largest))
        if int(failed) or following < CONDITION * largest:
            return None
        moved = torch.cholesky_solve(right.T, factor).T - start
        return start + moved.sub_((moved @ vectors) @ vectors.T)

    def _spectrum(self) -> tuple[Tensor, Tensor]:
        import torch

        values, vectors = torch.linalg.eigh(self.sides[0])
        return values.clamp_(min=0), vectors


def largest_eigenvalue(square: Tensor, steps: int = 24) -> float:
    """The largest eigenvalue of a symmetric (I, I) matrix whose eigenvalues are at least 0, from below: Lanczos' method.

    The start is fixed, so that equal matrices give equal numbers. Its error after 24 steps is below one in a hundred, but for
    starts that are orthogonal to the eigenvector, of which a normal one is none (Kuczynski and Wozniakowski, 1992).
    """
    import torch

    size = len(square)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator, dtype=square.dtype).to(square.device)
    basis = [start / start.norm()]
    for _ in range(min(steps, size) - 1):
        grown = square @ basis[-1]
        for _ in range(2):  # once is not orthogonal enough
            for each in basis:
                grown -= (each @ grown) * each
        if not float(length := grown.norm()) > 0:
            break
        basis.append(grown / length)
    span = torch.stack(basis, dim=1)
    return float(torch.linalg.eigvalsh(span.T @ square @ span)[-1])


def participation(values: Tensor, total: float | None = None) -> int:
    """(sum_k sigma_k)^2 / sum_k sigma_k^2, rounded, at least 1: how many of the directions with (k,) variances sigma_k^2 carry the
    weight; `total` is their sum where that is known better."""
    total = float(values.sum()) if total is None else total
    return max(1, round(float(values.sqrt().sum()) ** 2 / total)) if total else 1
