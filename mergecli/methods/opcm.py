"""OPCM: each new task vector is projected away from what was merged before, and the sum is scaled to a steady length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from mergecli.methods._base import Group, Groups, Shelf, TwoPass
from mergecli.methods._continual import START, Chain, Continual, Remembered, Step
from mergecli.methods._settings import Range
from mergecli.methods._svd import inverse, is_matrix, right_vectors

if TYPE_CHECKING:
    from torch import Tensor


class Surveyed(NamedTuple):
    """What OPCM knows of the whole model before it writes a tensor."""

    sums: Shelf
    """Tensor -> S after the step."""
    scale: float
    """lambda after the step."""
    norms: tuple[float, ...]
    """|tau_i| of every model so far."""


@dataclass(frozen=True)
class Opcm(Continual, TwoPass):
    """theta_k = theta_0 + S_k / lambda_k,  S_1 = tau_1,  S_k = S_{k-1} + P_k(tau_k),  for the models in their order

    With S_{k-1} = U diag(s) V^T, P_k takes from a matrix tau_k its parts u_i u_i^T tau_k v_i v_i^T for all i, and u_i u_i^T tau_k v_j
    v_j^T for i, j < r*; r* is the least number of singular values whose sum passes alpha sum(s), less one. So tau_k ends
    orthogonal to S_{k-1}. Other tensors: P_k(tau_k) = tau_k. Over the whole model lambda_k = |S_k| / ((1 / k) sum_i |tau_i|), so
    that every theta_k is as far from the base as the experts are on average.

    Directions of negligible singular values are left alone; FusionBench also takes the diagonal of an arbitrary basis of these.
    There the class embedding stays the first expert's, and alpha = 1 protects nothing; here it protects all directions.
    """

    title: ClassVar[str] = "task vectors added one by one, each projected away from the sum before it"
    paper: ClassVar[str] = (
        "Tang et al., Merging models on the fly without retraining, NeurIPS 2025, arXiv 2501.09522"
    )
    kind: ClassVar[str] = "continual"
    also_called: ClassVar[Mapping[str, str]] = {"orthogonal_projection_continual": "", "continual_opcm": ""}
    work: ClassVar[str] = "a singular value decomposition of each matrix for each model"
    elementwise: ClassVar[bool] = False
    remembers: ClassVar[Remembered] = "weights"
    why_not_without: ClassVar[str] = "later task vectors were projected away from it, and are not remembered"

    alpha: Annotated[float, Range(0, 1)] = 0.5
    """Share of the singular values' sum whose directions are protected on both sides at once."""

    def survey(self, groups: Groups, /) -> Surveyed:
        return self.survey_step(groups, START)

    def merge(self, group: Group, surveyed: Surveyed, /) -> Tensor:
        return self.whole(Step(group, START, surveyed))

    def survey_step(self, groups: Groups, chain: Chain, /) -> Surveyed:
        shelf = groups.shelf()
        lengths: list[list[float]] = []
        pieces: list[float] = []

        def look(group: Group) -> tuple[str, Tensor, list[float], float]:
            sums, squares = self._sums(group, chain)
            return group.name, sums, squares, _square(sums)

        for name, sums, squares, square in groups.map(look):
            shelf.put(name, sums)
            lengths.append(squares)
            pieces.append(square)
        new = [math.sqrt(math.fsum(parts)) for parts in zip(*lengths, strict=True)]
        norms = (*chain.numbers.get("norms", ()), *new)
        usual = math.fsum(norms) / len(norms)
        scale = math.sqrt(math.fsum(pieces)) / usual if usual else 1.0
        return Surveyed(shelf, scale, norms)

    def remember(self, step: Step, /) -> Tensor:
        group = step.group
        return step.surveyed.sums.get(group.name).view(group.shape).to(group.base.device)

    def weights(self, memory: Tensor, step: Step, /) -> Tensor:
        scale = step.surveyed.scale
        return memory.mul_(1 / scale if scale else 0.0).add_(step.group.base)

    def numbers(self, surveyed: Surveyed, /) -> Mapping[str, Sequence[float]]:
        return {"scale": (surveyed.scale,), "norms": surveyed.norms}

    def _sums(self, group: Group, chain: Chain) -> tuple[Tensor, list[float]]:
        """(...) S after the step, and |tau_i|^2 of the tensor for each new model."""
        rows = group.deltas
        squares = [_square(row) for row in rows[chain.before > 0 :]]
        sums = rows[0].clone()
        if chain.before:  # theta_{k-1} is known, and S_{k-1} is lambda_{k-1} times its task vector
            sums.mul_(chain.numbers["scale"][0])
        is_map = is_matrix(group, "table") and sums.numel() > 0
        for row in rows[1:]:
            sums += row.sub_(self._shared(sums, row)) if is_map else row
        return sums, squares

    def _shared(self, sums: Tensor, delta: Tensor) -> Tensor:
        """(O, I) float32, what `P_k` takes from a task vector."""
        if sums.shape[0] < sums.shape[1]:
            return self._shared(sums.T, delta.T).T
        # U = S V diag(1/s) is not made: S^T tau and the result are the only products of matrices as tall as S
        tall = sums.double()
        values, right = right_vectors(tall)
        by = inverse(values)[:, None]
        inner = right.T @ (tall.T @ delta.double()) @ right * by  # (k, k) U^T tau V
        before = values.cumsum(0)
        kept = int((before <= self.alpha * before[-1]).sum())
        taken = inner.diagonal().diag()
        taken[:kept, :kept] = inner[:kept, :kept]
        return (tall @ (right @ (taken * by) @ right.T)).float()


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())
