"""AdaMerging: coefficients that make the merged model sure of its predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergecli.methods._adam import adam_step
from mergecli.methods._adapted import Adapted, Change, Objective, combine, inner
from mergecli.methods._base import Group, Groups, total
from mergecli.methods._kth_largest import keep_largest, magnitude_thresholds
from mergecli.methods._learned import LearnedTensors, State
from mergecli.methods._settings import Fraction, Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdaMerging(Adapted):
    """theta = theta_0 + sum_i c_i tau_i,  the c_i minimizing  sum_t mean_x H(softmax(logits_t(x; theta)))

    by `steps` steps of Adam from `start`, H the entropy, x images of task t without labels; with
    `granularity = "layer"` one coefficient for each task and tensor. With `preprocess = "ties"` (AdaMerging++) the tau_i
    are those entries that survive TIES's trimming and agree with its elected sign.

    The published tables took batches of the test images; `split` takes others.
    """

    title: ClassVar[str] = "coefficients learned by making predictions on unlabeled images sure"
    published = "{granularity}-wise AdaMerging"
    paper: ClassVar[str] = "Yang et al., AdaMerging, ICLR 2024, arXiv 2310.02575, equations 4 to 6"
    also_called: ClassVar[Mapping[str, str]] = {
        "layer_wise_adamerging": "",
        "task_wise_adamerging": "granularity=task",
    }

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
    preprocess: Literal["none", "ties"] = "none"
    """Whether the task vectors are first trimmed and freed of disagreeing entries as TIES does."""
    density: Fraction = 0.2
    """With `preprocess = "ties"`: the fraction of entries kept of each task vector."""

    @property
    def phases(self) -> tuple[int, ...]:
        return (self.steps,)

    def survey(self, groups: Groups, /) -> State:
        if self.preprocess == "none":
            return {}
        import torch

        thresholds = magnitude_thresholds(groups, self.density)[""]  # infinity where nothing is kept
        return {"thresholds": thresholds.clamp_(max=torch.finfo(torch.float32).max)}

    def prepared(self, group: Group, surveyed: Mapping[str, Tensor], /) -> Tensor:
        if self.preprocess == "none":
            return group.deltas
        trimmed = keep_largest(group.deltas, surveyed["thresholds"].to(group.deltas.device))
        sign = total(trimmed).sign_()
        return trimmed.mul_((trimmed * sign) > 0)

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
        found: dict[str, tuple[int, ...]] = {
            "coefficients": (tasks, len(tensors) if self.granularity == "layer" else 1)
        }
        return found | ({"thresholds": (tasks,)} if self.preprocess == "ties" else {})

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
