"""AdaRank: which singular directions of each task vector are kept, learned on unlabeled images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from mergecli.methods._adam import adam_step
from mergecli.methods._adapted import UNSAVED, Adapted, Change, Objective, inner
from mergecli.methods._base import Group, total
from mergecli.methods._fused import stacks
from mergecli.methods._learned import LearnedTensors, State
from mergecli.methods._least_squares import is_linear
from mergecli.methods._settings import Fraction, Range
from mergecli.methods._svd import decompose

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class AdaRank(Adapted):
    """theta = o + sum_i c_i U_i diag(m_i s_i) V_i^T  for weights of linear layers, o + sum_i c_i tau_i for other tensors

    with U_i diag(s_i) V_i^T = tau_i = theta_i - o the singular value decomposition, queries, keys and values of a layer as
    one matrix. The c_i, one for each task and tensor, and the m_i in {0, 1} are learned by `steps` steps of Adam that
    minimize the entropy of the predictions on unlabeled images: m = 1 where sigmoid(mu / temperature) > 1/2, whose
    gradient is taken to be that of the sigmoid. mu = `initial_logits` for the first `initial_rank_ratio` of the
    directions, and its negative for the others.

    The authors have two sets of values: `center = "base"` with the defaults here (on task arithmetic), and
    `center = "mean"` with `initial_rank_ratio = 0.16` and `start = 2.3` (on CART; 1.0 for 20 tasks). What they report is the
    best of evaluations on test labels every 500 steps; what is kept here is the last step's.
    """

    title: ClassVar[str] = "coefficients and ranks of task vectors learned on unlabeled images"
    paper: ClassVar[str] = "Lee et al., AdaRank, ICLR 2026, arXiv 2503.22178"
    work: ClassVar[str] = (
        "a singular value decomposition of each matrix of each model, and steps of Adam, each with T products a matrix, and a "
        "forward and a backward pass of every task's batch; in memory 2 T + 3 towers"
    )
    elementwise: ClassVar[bool] = False

    center: Literal["base", "mean"] = "base"
    """o: the base, or the mean of the fine-tuned models."""
    steps: Annotated[int, Range(0)] = 10_000
    """Steps of Adam on masks and coefficients."""
    start: Annotated[float, Range()] = 0.3
    """Every coefficient before the first step."""
    initial_rank_ratio: Fraction = 1.0
    """The share of the directions, largest first, that are kept before the first step."""
    initial_logits: Annotated[float, Range(0, open_low=True)] = 0.1
    """|mu| before the first step."""
    temperature: Annotated[float, Range(0, open_low=True)] = 10.0
    """Of the sigmoid whose gradient takes the mask's place."""

    @property
    def phases(self) -> tuple[int, ...]:
        return (self.steps,)

    @property
    def fuses(self) -> bool:
        return True

    def prepared(self, group: Group, surveyed: Mapping[str, Tensor], /) -> Tensor:
        del surveyed
        return self._centered(group.deltas)

    def _centered(self, deltas: Tensor) -> Tensor:
        """(T + 1, ...) the tau_i, and o - theta_0."""
        import torch

        middle = torch.zeros_like(deltas[0]) if self.center == "base" else total(deltas).div_(len(deltas))
        return torch.cat([deltas - middle, middle[None]])

    def begin(self, objective: Objective, /) -> State:
        import torch

        shapes = {name: tuple(each.shape) for name, each in objective.weights.items()}
        device = next(iter(objective.weights.values())).device
        tasks, units = len(objective.tasks), [*stacks(shapes)]
        state: State = {"coefficients": torch.full((tasks, len(units)), self.start, device=device)}
        for name, size in self._ranks(shapes):
            logits = torch.full((tasks, size), self.initial_logits, device=device)
            logits[:, int(size * self.initial_rank_ratio) :] *= -1
            state[f"logits.{name}"] = logits
        moments = {
            f"{kind}.{key}": torch.zeros_like(each)
            for key, each in state.items()
            for kind in ("mean", "square")
        }
        return {**state, **moments}

    def step(self, objective: Objective, state: State, number: int, /) -> tuple[Tensor, Change]:
        import torch

        shapes = {name: tuple(each.shape) for name, each in objective.weights.items()}
        units = [(name, members or (name,)) for name, members in stacks(shapes)]
        for column, (name, members) in enumerate(units):
            merged = self._merged(objective, state, name, members, state["coefficients"][:, column])
            parts = merged.chunk(len(members)) if len(members) > 1 else [merged]
            for member, part in zip(members, parts, strict=True):
                torch.add(objective.base[member], part, out=objective.weights[member])
        losses, found = objective.losses_and_gradients(number)
        gradients: State = {"coefficients": torch.zeros_like(state["coefficients"])}
        for column, (name, members) in enumerate(units):
            gradient = torch.cat([found[member] for member in members]) if len(members) > 1 else found[name]
            coefficients = state["coefficients"][:, column]
            if f"logits.{name}" not in state:
                gradients["coefficients"][:, column] = inner(gradient, objective.deltas[name])[:-1]
                continue
            left, values, right = self._factors(objective, state, name, members)
            # with p_r = s_r u_r^T G v_r the derivatives are  dL/dc = sum_r m_r p_r  and  dL/dm_r = c p_r
            shares = (
                torch.stack([((gradient.T @ u) * v).sum(0) for u, v in zip(left, right, strict=True)])
                * values
            )
            mask = _mask(state[f"logits.{name}"])
            gradients["coefficients"][:, column] = (mask * shares).sum(1)
            soft = (state[f"logits.{name}"] / self.temperature).sigmoid()
            gradients[f"logits.{name}"] = (
                coefficients[:, None] * shares * soft * (1 - soft) / self.temperature
            )
        gradients = {key: objective.total(each) for key, each in gradients.items()}

        def change() -> None:
            for key, gradient in gradients.items():
                moments = state[f"mean.{key}"], state[f"square.{key}"]
                adam_step(state[key], gradient, *moments, self.learning_rate, number + 1)

        return losses, change

    def finish(self, objective: Objective, state: State, /) -> State:
        del objective
        masks = {key: _mask(each) for key, each in state.items() if key.startswith("logits.")}
        return {"coefficients": state["coefficients"].clone()} | {
            key.replace("logits.", "kept.", 1): each for key, each in masks.items()
        }

    def file_shapes(self, tasks: int, tensors: Shapes, /) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"coefficients": (tasks, len([*stacks(tensors)]))}
        return found | {f"kept.{name}": (tasks, size) for name, size in self._ranks(tensors)}

    def traced(self, state: State, /) -> Tensor:
        return state["coefficients"].mean(1)

    def merge(self, group: Group, learned: LearnedTensors, /) -> Tensor:
        import torch

        names = [name for name, _ in stacks(learned.shapes)]
        coefficients = learned.tensors["coefficients"][:, names.index(group.name)].tolist()
        *deltas, merged = self._centered(group.deltas)
        kept = learned.tensors.get(f"kept.{group.name}")
        for task, (delta, coefficient) in enumerate(zip(deltas, coefficients, strict=True)):
            if kept is None:
                merged.add_(delta, alpha=coefficient)
                continue
            left, values, right = decompose(delta)
            chosen = values.float() * kept[task].to(values.device)
            merged.add_(torch.mm(left.float() * chosen, right.float().T), alpha=coefficient)
        return merged.add_(group.base)

    def _ranks(self, shapes: Shapes) -> Iterator[tuple[str, int]]:
        """Name and smaller side of each matrix of a layer, queries, keys and values stacked."""
        for name, members in stacks(shapes):
            shape = shapes[members[0] if members else name]
            if is_linear(name, shape):
                yield name, min(shape[0] * max(1, len(members)), shape[1])

    def _factors(self, objective: Objective, state: State, name: str, members: tuple[str, ...]) -> Any:
        """(T, O, r), (T, r) and (T, I, r) decompositions of a matrix's task vectors, made once in a run."""
        import torch

        keys = [f"{UNSAVED}{part}.{name}" for part in ("left", "values", "right")]
        if keys[0] not in state:
            vectors = _stacked(objective, members)
            parts = [decompose(delta) for delta in vectors[:-1]]
            for key, each in zip(keys, zip(*parts, strict=True), strict=True):
                state[key] = torch.stack([part.float() for part in each])
        return [state[key] for key in keys]

    def _merged(
        self, objective: Objective, state: State, name: str, members: tuple[str, ...], coefficients: Tensor
    ) -> Tensor:
        """(...) the merged task vector of a tensor, or of several that are stacked."""
        import torch

        vectors = _stacked(objective, members)
        middle = vectors[-1].clone()
        if f"logits.{name}" not in state:
            return middle.add_(torch.tensordot(coefficients, vectors[:-1], dims=1))
        left, values, right = self._factors(objective, state, name, members)
        weights = coefficients[:, None] * values * _mask(state[f"logits.{name}"])
        for u, weight, v in zip(left, weights, right, strict=True):
            middle.addmm_(u * weight, v.T)
        return middle


def _stacked(objective: Objective, members: tuple[str, ...]) -> Tensor:
    """(T + 1, ...) float32 what `prepared` gives of a tensor, or of several that are stacked."""
    import torch

    if len(members) == 1:
        return objective.deltas[members[0]].float()
    return torch.cat([objective.deltas[member].float() for member in members], dim=1)


def _mask(logits: Tensor) -> Tensor:
    """1 where a direction is kept."""
    return (logits > 0).float()
