"""NUFILT: a new task vector is kept out of the input directions that the merge so far uses, and a low-rank part repairs it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._adam import adam_step
from mergecli.methods._base import Group, PerTensor
from mergecli.methods._continual import Continual, Remembered, Step
from mergecli.methods._settings import Range
from mergecli.methods._svd import decompose, gram, is_matrix
from mergecli.runtime import interrupts

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = re.compile(r"(^|\.)(layers|resblocks|blocks)\.\d+\.")
_LAST_OF_MLP = re.compile(r"\.(fc2|c_proj)\.weight$")
_SPREAD = 0.02
"""Standard deviation of A before the first step."""


@dataclass(frozen=True)
class Nufilt(Continual, PerTensor):
    """theta_k = theta_0 + M_k,  M_1 = tau_1,  M_k = M_{k-1} + tau_k (P + B A),  matrix by matrix, for the models in their order

    V are the first `protected` right singular vectors of M_{k-1}, N the first `wanted` of tau_k, and P = I - V V^T. B is 0 and A
    random at first; `steps` steps of Adam make |tau_k N - M_k N|^2 + |tau_k B A V|^2 small. Without them (M_k - M_{k-1}) V = 0.

    So it is for the matrices of layers but the second of each MLP; all other tensors stay the base's. V has no more than a sixth
    of the inputs, which 128 are of a ViT-B. The authors' code throws such directions away in the first task too; here M_1 = tau_1.
    """

    title: ClassVar[str] = (
        "task vectors added one by one, kept out of the directions that are used, and repaired"
    )
    paper: ClassVar[str] = (
        "Qiu et al., Null-space filtering for data-free continual model merging, ICLR 2026, arXiv 2509.21413"
    )
    kind: ClassVar[str] = "continual"
    work: ClassVar[str] = "two decompositions and `steps` thin products for each matrix and model"
    elementwise: ClassVar[bool] = False
    remembers: ClassVar[Remembered] = "weights"
    why_not_without: ClassVar[str] = (
        "later task vectors were kept out of its directions, and are not remembered"
    )

    protected: Annotated[int, Range(0)] = 128
    """Input directions of the merge so far that the new task vector does not touch before it is repaired."""
    wanted: Annotated[int, Range(0)] = 8
    """Input directions of the new task vector on which the merge should do what the new model does."""
    rank: Annotated[int, Range(0)] = 64
    """Of B A; 0 repairs nothing."""
    steps: Annotated[int, Range(0)] = 50
    """Of Adam; 0 repairs nothing."""
    learning_rate: Annotated[float, Range(0)] = 1e-3
    """About how far each entry of B and A moves in a step."""

    def merge(self, group: Group, /) -> Tensor:
        return self.whole(Step(group))

    def remember(self, step: Step, /) -> Tensor:
        group = step.group
        is_merged = _LAYER.search(group.name) and not _LAST_OF_MLP.search(group.name)
        if not is_merged or not is_matrix(group, "table") or not group.shape.numel():
            return group.base.clone()
        rows = group.deltas
        merged = rows[0].clone()
        for task in range(1, group.tasks):
            # as the next step of a chain finds it: added to the base, and taken from it
            merged = self._added(group, merged, task).add_(group.base).sub_(group.base)
        return merged.add_(group.base)

    def weights(self, memory: Tensor, step: Step, /) -> Tensor:
        del step
        return memory

    def _added(self, group: Group, merged: Tensor, task: int) -> Tensor:
        """(O, I) float32 M_k, of M_{k-1} and the task vector of one of the group's models."""
        before, new = merged.double(), group.deltas[task].double()
        inputs = before.shape[1]
        _, values, used = decompose(before, min(self.protected, inputs // 6))  # no more rows than there are
        used = used[:, values > 0]  # (I, p) V
        filtered = new - new @ used @ used.T
        if self.rank and self.steps:
            filtered += self._repair(group, task, before, new, used)
        return (before + filtered).float()

    def _repair(self, group: Group, task: int, before: Tensor, new: Tensor, used: Tensor) -> Tensor:
        """(O, I) float64 tau_k B A."""
        import torch

        inputs = new.shape[1]
        _, values, own = decompose(new, self.wanted)
        own = own[:, values > 0]  # (I, q) N
        missing = (new @ used @ used.T - before) @ own  # (O, q) what B A should add there
        second = _normal(group.uniform_numbers(task, self.rank * inputs).double()).view(self.rank, inputs)
        second *= _SPREAD  # (r, I) A
        first = torch.zeros(inputs, self.rank, dtype=torch.float64, device=new.device)  # (I, r) B
        moments = [torch.zeros_like(each) for each in (first, first, second, second)]
        # tau_k itself is in none of the gradients, only these two
        square, wish = gram(new), new.T @ missing  # (I, I), (I, q)
        for step in range(1, self.steps + 1):
            interrupts.check()
            on_own, on_used = second @ own, second @ used
            pushed = square @ first  # (I, r) tau_k^T tau_k B
            inner, outer = on_own @ on_own.T + on_used @ on_used.T, on_own @ own.T + on_used @ used.T
            slope_first = 2 * (pushed @ inner - wish @ on_own.T)
            slope_second = 2 * (first.T @ pushed @ outer - first.T @ wish @ own.T)
            adam_step(first, slope_first, moments[0], moments[1], self.learning_rate, step)
            adam_step(second, slope_second, moments[2], moments[3], self.learning_rate, step)
        return new @ first @ second


def _normal(uniform: Tensor) -> Tensor:
    """Numbers of the standard normal distribution, from some in [0, 1)."""
    return (2 * uniform.clamp_(min=2.0**-25) - 1).erfinv_() * 2**0.5
