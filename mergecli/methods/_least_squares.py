"""Linear layers merged by least squares: Gram matrices of their inputs, and the weights that fit all tasks best."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from mergecli.methods._depth import layer_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

RESOLVED = 1e-6
"""Variances below this share of an input's own are rounding: the Gram matrices are sums of float32."""

COLUMNS = 768
"""Columns of a Gram matrix that are computed at a time: of a symmetric matrix only those above the diagonal are."""

_PROJECTION = "visual_projection.weight"
_SHARED = re.compile(r"\b[qv]_proj\b")


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer of a transformer: a matrix in a numbered layer."""
    return len(shape) == 2 and name.endswith(".weight") and layer_of(name) is not None


def is_measured(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer whose inputs can be looked at: of a layer, or the visual projection."""
    return is_linear(name, shape) or (name == _PROJECTION and len(shape) == 2)


def within(module: str, name: str) -> str:
    """The whole name of what is called so in a module; that of the model itself is empty."""
    return f"{module}.{name}" if module else name


def owner(name: str) -> str:
    """The tensor or module with the same input, which is measured once: queries and values share that of the keys."""
    return _SHARED.sub("k_proj", name)


class Grams:
    """Sums x x^T and x over all inputs x of each linear layer in a module, from `with` to its end."""

    def __init__(self, module: Module) -> None:
        from torch.nn import Linear

        self._linears = {
            name: each
            for name, each in module.named_modules()
            if isinstance(each, Linear) and owner(name) == name
        }
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        self._totals: dict[str, Tensor] = {}

    def __enter__(self) -> Grams:
        def hook(name: str) -> Callable[[Module, tuple[Tensor, ...]], None]:
            def add(module: Module, inputs: tuple[Tensor, ...]) -> None:
                del module
                self._add(name, inputs[0])

            return add

        self._handles = [each.register_forward_pre_hook(hook(name)) for name, each in self._linears.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, name: str, inputs: Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1])  # (B S, I)
        if name not in self._sums:
            width = rows.shape[1]
            self._sums[name] = rows.new_zeros(width, width).double()
            self._totals[name] = rows.new_zeros(width).double()
            self._rows[name] = 0
        # Only what lies above the diagonal, by blocks of columns, which saves nearly half the products. Batches are summed
        # in float64: in float32 the small variances that `Regression` resolves would drown in the large ones.
        for start in range(0, rows.shape[1], COLUMNS):
            self._sums[name][start : start + COLUMNS, start:] += (
                rows[:, start : start + COLUMNS].T @ rows[:, start:]
            )
        self._totals[name] += rows.double().sum(0)
        self._rows[name] += len(rows)

    def mean_inputs(self) -> Iterator[tuple[str, Tensor]]:
        """(I,) float32 mean of x, by the name of each `owner` among the linear layers."""
        for name, total in self._totals.items():
            yield name, (total / self._rows[name]).float()

    def means(self) -> Iterator[tuple[str, Tensor]]:
        """(I, I) float32 mean of x x^T, by the name of each `owner` among the linear layers; frees each sum."""
        while self._sums:
            name, upper = self._sums.popitem()
            gram = upper.div_(self._rows[name]).triu_().float()
            yield name, gram + gram.triu(1).T


class Regression:
    """Weights that, on the inputs of every task, give nearly what that task's own weights give; task by task.

    For Gram matrices G_i, off-diagonal entries multiplied by `off_diagonal`, and changes D_i of the weights (O, I) from
    some point: the change D that minimizes  sum_i tr (D - D_i) G_i (D - D_i)^T + T ridge m |D|^2,  m the mean diagonal
    entry of the G_i; of several such changes the smallest, where inputs are measured in their own spread. So inputs
    that were never seen, or never apart from others, change nothing that need not be changed.
    """

    def __init__(self, off_diagonal: float, ridge: float) -> None:
        self._off_diagonal, self._ridge = off_diagonal, ridge
        self._left: Tensor | None = None
        self._right: dict[str, Tensor] = {}

    def add(self, gram: Tensor, changes: Mapping[str, Tensor]) -> None:
        """Adds a task: its (I, I) Gram matrix, and the (O, I) float64 change of each weight on that input."""
        import torch

        diagonal = gram.diagonal().double()
        if self._left is None:
            self._left = torch.zeros_like(gram, dtype=torch.float64)
        self._left.add_(gram, alpha=self._off_diagonal)
        self._left.diagonal().add_(diagonal, alpha=1 - self._off_diagonal)
        for name, change in changes.items():
            right = self._right.setdefault(name, torch.zeros_like(change))
            right.addcmul_(change, diagonal, value=1 - self._off_diagonal)
            for start in range(0, len(gram), COLUMNS):
                rows = slice(start, start + COLUMNS)
                right.addmm_(change[:, rows], gram[rows].double(), alpha=self._off_diagonal)

    def solve(self) -> dict[str, Tensor]:
        """(O, I) float64 change of each weight; can be asked for once."""
        import torch

        assert self._left is not None
        left = self._left
        # Inputs are divided by their spread, so that `RESOLVED` is a share of each input's own variance, however much
        # inputs differ in size. One that was always 0 has no spread, and its weights do not change.
        left.diagonal().add_(self._ridge * left.diagonal().mean())
        spread = left.diagonal().rsqrt()
        spread[left.diagonal() == 0] = 0
        left.mul_(spread).mul_(spread[:, None])
        left.diagonal().fill_(1)
        # Cholesky is several times as fast as eigenvectors, but sees no directions. The smallest eigenvalue is at most the
        # smallest squared pivot: where that is below `RESOLVED`, some direction is rounding, and eigenvectors say which.
        factor, failed = torch.linalg.cholesky_ex(left)
        if not int(failed) and float(factor.diagonal().min()) ** 2 > RESOLVED:
            return {
                name: torch.cholesky_solve(right.mul_(spread).T, factor).T * spread
                for name, right in self._right.items()
            }
        del factor  # as large as the matrix
        values, vectors = torch.linalg.eigh(left)
        kept = values > RESOLVED * values[-1]
        vectors = vectors[:, kept]
        return {
            name: ((right.mul_(spread) @ vectors) / values[kept]) @ vectors.T * spread
            for name, right in self._right.items()
        }
