"""Coefficients of task vectors: how they are learned by descent, and how they are applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergecli.methods._adam import adam_step
from mergecli.methods._adapted import Adapted, Change, Objective, combine, inner
from mergecli.methods._base import Group
from mergecli.methods._learned import LearnedTensors, State
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CoefficientLearner(Adapted):
    """Methods that learn nothing but coefficients of what `prepared` gives, from the same start and by Adam."""

    work: ClassVar[str] = (
        "steps of Adam on the coefficients, each a forward and a backward pass of every task's batch; in memory T + 3 towers "
        "(base, task vectors, merged weights, gradients) and the activations of a batch"
    )

    granularity: Literal["task", "layer"] = "layer"
    """One coefficient a task, or one for each task and tensor."""
    steps: Annotated[int, Range(0)] = 1000
    """Steps of Adam; 0 is task arithmetic with the scaling factor `start`."""
    start: Annotated[float, Range()] = 0.3
    """Every coefficient before the first step."""
    clamp: bool = False
    """Whether coefficients are kept in [0, 1]."""

    @property
    def phases(self) -> tuple[int, ...]:
        return (self.steps,)

    def begin(self, objective: Objective, /) -> State:
        import torch

        columns = len(objective.weights) if self.granularity == "layer" else 1
        device = next(iter(objective.weights.values())).device
        start = torch.full((len(objective.tasks), columns), self.start, device=device)
        return {"coefficients": start, "mean": torch.zeros_like(start), "square": torch.zeros_like(start)}

    def step(self, objective: Objective, state: State, number: int, /) -> tuple[Tensor, Change]:
        used = self._used(state)  # (T, P) or (T, 1)
        for name, own in columns(objective, used):
            combine(objective.deltas[name], own, objective.weights[name]).add_(objective.base[name])
        losses, gradients = objective.losses_and_gradients(number)
        gradient = coefficient_gradients(objective, gradients.items(), used.shape[1])
        if self.clamp:
            gradient *= (state["coefficients"] >= 0) & (state["coefficients"] <= 1)
        return losses, lambda: adam_step(
            state["coefficients"], gradient, state["mean"], state["square"], self.learning_rate, number + 1
        )

    def finish(self, objective: Objective, state: State, /) -> State:
        del objective
        return {"coefficients": self._used(state).clone()}

    def file_shapes(
        self, tasks: int, tensors: Mapping[str, tuple[int, ...]], /
    ) -> dict[str, tuple[int, ...]]:
        return {"coefficients": (tasks, len(tensors) if self.granularity == "layer" else 1)}

    def traced(self, state: State, /) -> Tensor:
        return self._used(state).mean(1)

    def _used(self, state: State) -> Tensor:
        return state["coefficients"].clamp(0, 1) if self.clamp else state["coefficients"]

    def merge(self, group: Group, learned: LearnedTensors, /) -> Tensor:
        vectors = self.prepared(group, learned.tensors)
        return weighted(group, vectors, coefficients_of(learned, group.name))


def columns(objective: Objective, coefficients: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Each tensor's name and its (T,) coefficients, of (T, P) or (T, 1)."""
    last = coefficients.shape[1] - 1
    return ((name, coefficients[:, min(column, last)]) for column, name in enumerate(objective.weights))


def coefficient_gradients(
    objective: Objective, gradients: Iterable[tuple[str, Tensor]], count: int
) -> Tensor:
    """(T, P) gradients with respect to the coefficients from those with respect to each tensor's merged task vector,
    or if `count` is 1 (T, 1) their sums over the tensors."""
    import torch

    each = torch.stack([inner(gradient, objective.deltas[name]) for name, gradient in gradients], dim=1)
    return objective.total(each if count > 1 else each.sum(1, keepdim=True))


def coefficients_of(learned: LearnedTensors, name: str) -> list[float]:
    """The T coefficients of one tensor."""
    table = learned.tensors["coefficients"]
    column = learned.names.index(name) if table.shape[1] > 1 else 0
    return table[:, column].tolist()


def weighted(group: Group, vectors: Tensor, coefficients: list[float]) -> Tensor:
    """(...) base + sum_i c_i vector_i, added from the first to the last."""
    result = group.base.clone()
    for vector, coefficient in zip(vectors, coefficients, strict=True):
        result.add_(vector, alpha=coefficient)
    return result
