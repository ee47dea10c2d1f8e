"""WUDI: the merged task vector that interferes least with the tasks' own inputs, found by descent or solved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergecli.methods._adam import adam
from mergecli.methods._base import Group, PerTensor, total
from mergecli.methods._normal_equation import NormalEquation
from mergecli.methods._settings import Range
from mergecli.methods._svd import PositionEmbedding, gram, is_matrix

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Wudi(PerTensor):
    """theta = theta_0 + M,  matrix by matrix:  M minimizes  sum_i |(M - tau_i) tau_i^T|^2 / |tau_i|^2

    The gradient is 2 (M C - D) with C = sum_i tau_i^T tau_i / |tau_i|^2 and D = sum_i tau_i tau_i^T tau_i / |tau_i|^2. Task
    vectors that are 0 are left out of the sum. Solvers:

    adam      `steps` steps of Adam from M_0 = sum_i tau_i, which do not reach the minimum; a step costs one product,
              whatever the number of tasks. The paper takes 300 steps, FusionBench's recipe 400
    ridge     M = D (C + rho)^-1, the minimum itself; with a tiny rho its directions of small eigenvalues are noise
    spectral  M = M_0 + (D - M_0 C) Q diag(h / lambda) Q^T,  C = Q diag(lambda) Q^T,  h_k = 1 - exp(-t lambda_k) for the K
              largest eigenvalues, else 0: gradient descent that is long enough, stopped by direction (SWUDI)

    ridge and spectral take seconds where Adam takes minutes, in float64. Other tensors:
    theta = theta_0 + (1 / T) sum_i tau_i. Of SWUDI (Wei et al., 2026, arXiv 2606.07289) t, K for the whole model and the
    start are not public: M_0, t without end, and K = (sum sigma)^2 / sum sigma^2 with sigma = sqrt(lambda) are ours.
    """

    title: ClassVar[str] = "the merged task vector that interferes least with each task's inputs"
    paper: ClassVar[str] = (
        "Cheng et al., Whoever started the interference should end it, ICML 2025, arXiv 2503.08099"
    )
    published = "WUDI"
    work: ClassVar[str] = (
        "`steps` products of square matrices for each matrix, or one eigendecomposition of such a matrix"
    )
    elementwise: ClassVar[bool] = False

    solver: Literal["adam", "ridge", "spectral"] = "adam"
    """How M is found: by descent as published, or in closed form."""
    steps: Annotated[int, Range(0)] = 400
    """Of adam: its steps; 0 is task arithmetic with a scaling factor of 1 on the matrices."""
    learning_rate: Annotated[float, Range(0)] = 1e-5
    """Of adam: about how far each entry moves in a step."""
    ridge: Annotated[float, Range(0)] = 1e-8
    """Of ridge: rho, beside eigenvalues whose sum is the number of tasks; 0 is the pseudo-inverse where there is no inverse."""
    rank: Annotated[int, Range(0)] = 0
    """Of spectral: K, how many eigenvalues count; 0 asks each matrix's own spectrum."""
    time: Annotated[float, Range(0)] = 0.0
    """Of spectral: t, how long gradient descent lasts: 2 x learning rate x steps; 0 is without end."""
    position_embedding: PositionEmbedding = "table"
    """Whether the position embedding is a table of vectors, averaged like other tensors, or a matrix as in
    FusionBench."""

    def merge(self, group: Group, /) -> Tensor:
        import torch

        deltas = group.deltas
        merged = total(deltas)
        if not is_matrix(group, self.position_embedding):
            return merged.div_(group.tasks).add_(group.base)
        if self.solver != "adam":
            return self._solved(deltas, merged).add_(group.base)
        weights = torch.zeros(group.shape[1], group.shape[1], device=merged.device)
        wanted = torch.zeros_like(merged)
        for delta in deltas:
            square = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
            if square:
                inputs = gram(delta).mul_(2 / square)
                weights += inputs
                wanted += delta @ inputs
        room = torch.empty_like(merged)

        def gradient(at: Tensor) -> Tensor:
            return torch.mm(at, weights, out=room).sub_(wanted)

        return adam(merged, gradient, self.learning_rate, self.steps).add_(group.base)

    def _solved(self, deltas: Tensor, start: Tensor) -> Tensor:
        """(O, I) float32 M in closed form, from (T, O, I) task vectors and their sum."""
        import torch

        equation, empty = NormalEquation(), True
        for delta in deltas:
            square = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
            if square:
                equation.add(delta, weight=1 / square)
                empty = False
        if empty:
            return torch.zeros_like(start)
        if self.solver == "ridge":
            return equation.ridge(self.ridge).float()
        return equation.filtered(start, self.rank or None, self.time or math.inf).float()
