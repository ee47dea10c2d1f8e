"""PWE-MoE: coefficients as a function of how much each task counts, learned once for every preference."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from mergecli.methods._adam import adam_step
from mergecli.methods._adapted import Adapted, Change, Objective, combine, inner
from mergecli.methods._base import Group, gaussian
from mergecli.methods._coefficients import weighted
from mergecli.methods._learned import LearnedTensors, State
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = re.compile(r"^(.*\.\d+\.(?:mlp|self_attn))\.")
ROUTERS = ("router.0.weight", "router.0.bias", "router.1.weight", "router.1.bias")
"""Keys of A_1, b_1, A_2 and b_2, those of all blocks stacked along the first dimension, in the order of the network."""
LOWEST_RATE = 0.1
"""The learning rate of the last step, as a share of that of the first."""


@dataclass(frozen=True)
class PweMoe(Adapted):
    """theta(a) = theta_0 + sum_i c_i(a) tau_i,  c(a) = A_2 relu(A_1 a + b_1) + b_2  for the attention and the MLP of each layer,
    c_i = `start` elsewhere,  a_i >= 0 with sum_i a_i = 1 how much task i counts: the preference

    A_1 (2T, T) and A_2 (T, 2T), one router for each attention and each MLP, minimize  sum_t a_t loss_t(theta(a))  for
    preferences a that are drawn evenly from all (Dirichlet), a new one for each of `steps` steps of Adam, whose learning
    rate falls to a tenth along half a cosine. So they are learned once, and `preference` then gives any tower between the tasks:
    a plain one, although the paper calls the routers a mixture.

    The authors take the cross-entropy to labels of training images. Methods see no labels here: the classes that the tasks' own
    models predict take their place. This is the paper's linear scalarization; its exact Pareto optimization is not here.
    """

    title: ClassVar[str] = (
        "coefficients for every preference among the tasks, learned at once on unlabeled images"
    )
    paper: ClassVar[str] = "Tang et al., Towards efficient Pareto set approximation, arXiv 2406.09770"
    also_called: ClassVar[Mapping[str, str]] = {
        "pwemoe": "", "pareto_weight_ensembling_moe": "", "pwe_moe_linear_scalarization": "",
    }  # fmt: skip
    merge_time: ClassVar[frozenset[str]] = frozenset({"preference"})
    work: ClassVar[str] = (
        "steps of Adam on a small router a block, each a forward and a backward pass of every task's batch; in memory T + 3 "
        "towers (base, task vectors, merged weights, gradients) and the activations of a batch"
    )

    preference: tuple[float, ...] = ()
    """How much each task counts, in the order of `[tuned]`, divided by their sum; by default all the same. What was learned serves
    all preferences."""
    objective: Literal["entropy", "experts"] = "experts"
    """The loss: the cross-entropy to what the task's own model predicts, or the entropy of the predictions."""
    steps: Annotated[int, Range(0)] = 8000
    """Steps of Adam; 0 is task arithmetic."""
    start: Annotated[float, Range()] = 0.3
    """b_2 before the first step, and every coefficient outside of attention and MLPs."""
    router_spread: Annotated[float, Range(0)] = 0.01
    """Standard deviation of the routers' weights before the first step."""
    learning_rate: Annotated[float, Range(0)] = 1e-5
    """Of Adam in the first step."""
    split: Literal["test", "train", "validation"] = "train"
    """Whose images are looked at, without their labels."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        preference = settings.get("preference", ())
        if not len(preference):
            return []
        if len(preference) != len(tasks):
            got = f"expected one number for each of {len(tasks)} models, got {len(preference)}"
            return [("preference", got)]
        if min(preference) < 0 or not sum(preference) > 0:
            return [("preference", "expected numbers of at least 0, and one above")]
        return []

    @property
    def phases(self) -> tuple[int, ...]:
        return (self.steps,)

    def begin(self, objective: Objective, /) -> State:
        import torch

        some = next(iter(objective.weights.values()))
        shapes = self.file_shapes(
            len(objective.tasks), {name: tuple(each.shape) for name, each in objective.weights.items()}
        )
        state: State = {}
        for key in ROUTERS:
            size = math.prod(shapes[key])
            if key.endswith("weight"):
                drawn = gaussian(*(objective.drawn(f"{key} {part}", size) for part in ("radius", "angle")))
                state[key] = drawn.mul_(self.router_spread).view(shapes[key]).to(some.device)
            else:
                state[key] = torch.zeros(shapes[key], device=some.device)
        state[ROUTERS[-1]] += self.start
        moments = {
            f"{kind}.{key}": torch.zeros_like(value)
            for key, value in state.items()
            for kind in ("mean", "square")
        }
        return {**state, **moments}

    def step(self, objective: Objective, state: State, number: int, /) -> tuple[Tensor, Change]:
        import torch

        tasks, place = len(objective.tasks), places(objective.weights)
        ray = _simplex(objective.drawn(f"preference {number}", tasks)).to(state[ROUTERS[0]].device)
        with torch.enable_grad():
            learned = [state[key].clone().requires_grad_() for key in ROUTERS]
            routed = _routed(learned, ray)  # (G, T)
        elsewhere, own = torch.full_like(ray, self.start), routed.detach()
        for name, weight in objective.weights.items():
            coefficients = own[place[name]] if name in place else elsewhere
            combine(objective.deltas[name], coefficients, weight).add_(objective.base[name])
        losses, gradients = objective.losses_and_gradients(number, factors=ray)
        found = torch.zeros_like(own)
        for name, gradient in gradients.items():
            if name in place:
                found[place[name]] += inner(gradient, objective.deltas[name])
        routers = torch.autograd.grad(routed, learned, objective.total(found))
        rate = self._rate(number)

        def change() -> None:
            for key, gradient in zip(ROUTERS, routers, strict=True):
                adam_step(
                    state[key], gradient, state[f"mean.{key}"], state[f"square.{key}"], rate, number + 1
                )

        return losses, change

    def _rate(self, number: int) -> float:
        """The learning rate of a step."""
        share = (1 + math.cos(math.pi * number / max(self.steps, 1))) / 2
        return self.learning_rate * (LOWEST_RATE + (1 - LOWEST_RATE) * share)

    def finish(self, objective: Objective, state: State, /) -> State:
        del objective
        return {key: state[key].clone() for key in ROUTERS}

    def file_shapes(
        self, tasks: int, tensors: Mapping[str, tuple[int, ...]], /
    ) -> dict[str, tuple[int, ...]]:
        blocks = len(set(places(tensors).values()))
        shapes = ((2 * tasks, tasks), (2 * tasks,), (tasks, 2 * tasks), (tasks,))
        return {key: (blocks, *shape) for key, shape in zip(ROUTERS, shapes, strict=True)}

    def traced(self, state: State, /) -> Tensor:
        learned = [state[key] for key in ROUTERS]
        tasks = learned[0].shape[2]
        return _routed(learned, learned[0].new_full((tasks,), 1 / tasks)).mean(0)

    def merge(self, group: Group, learned: LearnedTensors, /) -> Tensor:
        import torch

        place = places(learned.names)
        if group.name not in place:
            return weighted(group, group.deltas, [self.start] * group.tasks)
        routers = [learned.tensors[key] for key in ROUTERS]
        wanted = torch.tensor(self.preference or (1.0,) * group.tasks, dtype=torch.float64)
        coefficients = _routed(routers, (wanted / wanted.sum()).float())
        return weighted(group, group.deltas, coefficients[place[group.name]].tolist())


def places(names: Iterable[str]) -> dict[str, int]:
    """Tensor of an attention or an MLP -> number of its block, counted as the names come."""
    found = {name: match[1] for name in names if (match := _BLOCK.match(name))}
    numbers = {block: number for number, block in enumerate(dict.fromkeys(found.values()))}
    return {name: numbers[block] for name, block in found.items()}


def _routed(routers: list[Tensor], preference: Tensor) -> Tensor:
    """(G, T) coefficients of each block, from A_1, b_1, A_2 and b_2 of all, and a (T,) preference."""
    first, first_bias, last, last_bias = routers
    hidden = (first @ preference + first_bias).relu()  # (G, 2T)
    return (last @ hidden[..., None])[..., 0] + last_bias


def _simplex(uniform: Tensor) -> Tensor:
    """(T,) a point drawn evenly from all with a sum of 1, from (T,) random numbers in [0, 1)."""
    import torch

    waits = -torch.log1p(-uniform.double())
    return (waits / waits.sum().clamp(min=torch.finfo(torch.float64).tiny)).float()
