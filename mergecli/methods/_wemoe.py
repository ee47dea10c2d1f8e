"""Weight-ensembling mixtures: their routers, how those are learned, and how the tower is put together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from mergecli.methods._adam import adam_step
from mergecli.methods._adapted import Adapted, Change, Objective
from mergecli.methods._base import Group, gaussian, total
from mergecli.methods._learned import State
from mergecli.methods._mixture import SAME, Installed, Part, Read, Routed, Routing
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor, nn

_MLP = re.compile(r"^(?P<layer>.*\.(?P<number>\d+)\.mlp)\.(?P<own>fc[12]\.(weight|bias))$")
_FIRST = "fc1.weight"
ROUTER = "router."
"""What the routers' keys begin with."""


@dataclass(frozen=True)
class WeightEnsembling(Routed, Adapted):
    """A tower whose multilayer perceptrons (MLPs) are put together by routers that are learned on unlabeled images."""

    work: ClassVar[str] = (
        "steps of Adam on the routers, each a forward and a backward pass of every task's batch"
    )

    prefixes = ("experts.", ROUTER)
    own_tower: ClassVar[str] = "that task's MLPs; the rest is shared by all tasks"

    learning_rate: Annotated[float, Range(0)] = 1e-4
    """Of Adam."""
    steps: Annotated[int, Range(0)] = 1000
    """Steps of Adam on the routers."""
    start: Annotated[float, Range()] = 0.3
    """lambda: the factor of all task vectors outside of MLPs, and b_2 before the first step."""
    router_layers: Annotated[int, Range(0, 2)] = 2
    """2: as above; 1: r(h) = A h + b; 0: a constant."""
    router_spread: Annotated[float, Range(0)] = 0.01
    """Standard deviation of the routers' weights before the first step; 0 makes them constant, which is task arithmetic."""
    train_routing: Literal["batch", "sample"] = "batch"
    """While learning: whether the images of a task's batch share their routing weights, as published, or each has its own.
    The latter is how images are evaluated by default; it takes more memory."""

    @property
    def shares_router(self) -> bool:
        """Whether all layers have one router."""
        return False

    @property
    def position_size(self) -> int:
        """How many numbers encode a layer's position for a router."""
        return 0

    @property
    def phases(self) -> tuple[int, ...]:
        return (self.steps,)

    def is_put_together(self, name: str) -> bool:
        """Whether a tensor is put together for each input; all others are those of task arithmetic."""
        return _MLP.match(name) is not None

    def routes_of(self, shape: tuple[int, ...], tasks: int) -> int:
        """How many routing weights an MLP has whose first weight has this shape."""
        del shape
        return tasks

    def parts(self, name: str, shape: tuple[int, ...], tasks: int, /) -> dict[str, Part]:
        own = {name: Part(SAME, shape)}
        return own | (self.expert_parts(name, shape, tasks) if self.is_put_together(name) else {})

    def expert_parts(self, name: str, shape: tuple[int, ...], tasks: int) -> dict[str, Part]:
        """Key -> tensor that is written for the task vectors of an MLP's tensor."""
        return {f"experts.{name}": Part(SAME, (tasks, *shape))}

    def expert_values(self, name: str, deltas: Tensor) -> dict[str, Tensor]:
        """The tensors of `expert_parts`."""
        return {f"experts.{name}": deltas}

    def expert(self, name: str, index: int, shape: Sequence[int], read: Read) -> Tensor:
        """(...) one task's vector, from the file."""
        del shape
        return read(f"experts.{name}")[index].float()

    def extras(self, tensors: Mapping[str, tuple[int, ...]], tasks: int, /) -> dict[str, Part]:
        found: dict[str, Part] = {}
        for name, shape in tensors.items():
            match = _MLP.match(name)
            if match and match["own"] == _FIRST:
                for key, size in self._router_shapes(shape, tasks).items():
                    found[self._router_key(match["layer"]) + key] = Part("F32", size)
        return found

    def _router_key(self, layer: str) -> str:
        return f"{ROUTER}shared." if self.shares_router else f"{ROUTER}{layer}."

    def _router_shapes(self, shape: tuple[int, ...], tasks: int) -> dict[str, tuple[int, ...]]:
        """Key -> shape of the parameters of the router of an MLP whose first weight has this shape."""
        width, routes = shape[1] + self.position_size, self.routes_of(shape, tasks)
        if self.router_layers == 0:
            return {"0.bias": (routes,)}
        last = {"weight": (routes, width), "bias": (routes,)}
        first = {"0.weight": (width, width), "0.bias": (width,)} if self.router_layers == 2 else {}
        return {**first, **{f"{self.router_layers - 1}.{key}": size for key, size in last.items()}}

    def expand(self, group: Group, learned: Any, /) -> dict[str, Tensor]:
        del learned
        if self.is_put_together(group.name):
            return {group.name: group.base.clone(), **self.expert_values(group.name, group.deltas)}
        return {group.name: total(group.deltas).mul_(self.start).add_(group.base)}

    def values(self, learned: Any, /) -> dict[str, Tensor]:
        return {key: value for key, value in learned.tensors.items() if key.startswith(ROUTER)}

    def weights(self, name: str, index: int, read: Read, /) -> Tensor:
        own = read(name).float()
        return own + self.expert(name, index, own.shape, read) if self.is_put_together(name) else own

    def install(
        self, tower: nn.Module, read: Read, tasks: Sequence[str], routing: Routing, prefix: str, /
    ) -> Installed:
        import torch

        from mergecli.methods._routed_linears import put
        from mergecli.methods._wemoe_layers import RoutedMlp, RoutedTower, Router

        layers: dict[str, RoutedMlp] = {}
        parameters: dict[str, Tensor] = {}
        routers: dict[str, Router] = {}
        paths = [path for path, _ in tower.named_modules() if _MLP.match(f"{prefix}{path}.{_FIRST}")]
        for path in paths:
            mlp: Any = tower.get_submodule(path)
            like = mlp.fc1.weight
            key = self._router_key(prefix + path)
            if key not in routers or self.position_size:
                own = {
                    each: parameters.get(key + each, read(key + each).to(like.device))
                    for each in self._router_shapes(tuple(like.shape), len(tasks))
                }
                position = torch.tensor(_sinusoid(int(path.split(".")[-2]), self.position_size))
                routers[key] = Router(own, position.to(like.device))
                for each, parameter in zip(own, list(routers[key].own), strict=True):
                    if (
                        key + each in parameters
                    ):  # one router for all layers: they share parameters, not positions
                        routers[key].own[list(own).index(each)] = parameters[key + each]
                    else:
                        parameters[key + each] = parameter
            parts = [
                self.linear_part(f"{prefix}{path}.{name}", mlp.get_submodule(name), read)
                for name in ("fc1", "fc2")
            ]
            layers[path] = RoutedMlp(mlp, parts, routers[key], routing, len(tasks), self.best_routes)
            put(tower, path, layers[path])
        return RoutedTower(tower, layers, parameters)

    def install_to_learn(
        self, tower: nn.Module, read: Read, tasks: Sequence[str], prefix: str, /
    ) -> Installed:
        return self.install(tower, read, tasks, self.train_routing, prefix)

    @property
    def best_routes(self) -> int:
        """How many routing weights of an MLP count, the largest; 0: all."""
        return 0

    def linear_part(self, name: str, layer: Any, read: Read) -> Any:
        """What the tasks add to one linear layer of an MLP, on its device and in its dtype."""
        from mergecli.methods._wemoe_layers import WholeVectors

        experts = self.experts(f"{name}.weight", layer.weight, read)
        return WholeVectors(experts, self.dense(f"{name}.bias", layer.bias, read))

    def experts(self, name: str, like: Tensor, read: Read) -> Any:
        """The task vectors of one weight, on the device and in the dtype of `like`."""
        from mergecli.methods._wemoe_layers import Dense

        return Dense(self.dense(name, like, read))

    def dense(self, name: str, like: Tensor, read: Read) -> Tensor:
        """(T, ...) the task vectors of any tensor, with every entry."""
        return read(f"experts.{name}").to(like)

    def begin(self, objective: Objective, /) -> State:
        import torch

        state: State = {}
        for key, weight in objective.weights.items():
            state[key] = torch.zeros_like(weight)
            if key.endswith(".weight"):
                drawn = gaussian(*(objective.uniform(key, part) for part in ("radius", "angle")))
                state[key] = self.router_spread * drawn
            elif key.endswith(f"{max(self.router_layers - 1, 0)}.bias"):
                state[key] += self.start
        moments = {
            f"{kind}.{key}": torch.zeros_like(value)
            for key, value in state.items()
            for kind in ("mean", "square")
        }
        device = next(iter(objective.weights.values())).device
        return {**state, **moments, "routes": torch.zeros(len(objective.tasks), device=device)}

    def step(self, objective: Objective, state: State, number: int, /) -> tuple[Tensor, Change]:
        for key, weight in objective.weights.items():
            weight.copy_(state[key])
        losses, gradients = objective.losses_and_gradients(number)
        found = {key: objective.total(gradient.clone()) for key, gradient in gradients.items()}
        routes = objective.routes()

        def change() -> None:
            for key, gradient in found.items():
                moments = state[f"mean.{key}"], state[f"square.{key}"]
                adam_step(state[key], gradient, *moments, self.learning_rate, number + 1)
            state["routes"].copy_(routes)

        return losses, change

    def finish(self, objective: Objective, state: State, /) -> State:
        return {key: state[key].clone() for key in objective.weights}

    def file_shapes(
        self, tasks: int, tensors: Mapping[str, tuple[int, ...]], /
    ) -> dict[str, tuple[int, ...]]:
        return {key: part.shape for key, part in self.extras(tensors, tasks).items()}

    def traced(self, state: State, /) -> Tensor:
        return state["routes"]


def _sinusoid(position: int, size: int) -> list[float]:
    """Sines and cosines of a layer's number, as in Vaswani et al. (2017)."""
    angles = [position / 10000 ** (2 * (number // 2) / max(size, 1)) for number in range(size)]
    return [math.cos(angle) if number % 2 else math.sin(angle) for number, angle in enumerate(angles)]
