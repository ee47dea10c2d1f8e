"""A tower that finds the tasks that each image may be of, and then is TSV-M of them.

Letters in shapes: T tasks, B images, S tokens of an image, n inputs, m outputs, k singular vectors of a task, K of some tasks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportUnknownVariableType]
from torch.nn import functional

from mergecli.methods._depth import layer_of
from mergecli.methods._routed_linears import put
from mergecli.methods._svd import inverse, inverse_root
from mergecli.methods._task_towers import WholeTower, body_of, joined
from mergecli.runtime import interrupts

Tasks = tuple[int, ...]
LEAST = 4
"""What was computed for so many sets of tasks is held in any case; for more while it takes no more room than the tower."""


class Factors(NamedTuple):
    """What is kept of a matrix of each task."""

    left: Tensor
    """(T, m, k) U_i S_i."""
    right: Tensor
    """(T, k, n) V_i^T."""

    def of(self, tasks: Tasks) -> tuple[Tensor, Tensor]:
        """(m, K) and (K, n): those of some tasks side by side."""
        chosen = list(tasks)
        return self.left[chosen].transpose(0, 1).flatten(1), self.right[chosen].flatten(0, 1)


class MassLinear(nn.Linear):
    """W x + b + L C R x, L and R of the tasks that are merged; W x + b where none are."""

    def __init__(self, linear: nn.Linear, factors: Factors) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")  # pyright: ignore[reportUnnecessaryComparison]
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.factors = factors
        self.merged: tuple[Tasks, Tensor] | None = None
        """The tasks that are merged, and C."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., m) of (..., n)."""
        result = functional.linear(input, self.weight, self.bias)
        if self.merged is None:
            return result
        tasks, core = self.merged
        left, right = self.factors.of(tasks)
        inner = functional.linear(functional.linear(input, right), core)
        return result + functional.linear(inner, left)


class _Reached(Exception):  # noqa: N818  no error: the first pass has seen what it is for
    """Ends a forward pass."""


@dataclass
class MassTower(WholeTower):
    """A tower whose `forward` sends each image through TSV-M of the tasks that it may be of; its own weights are the base's."""

    tower: nn.Module
    body: nn.Module
    """The same tower, with its parameters, its own `forward`, and layers that can be any tasks' merge."""
    layers: Mapping[str, MassLinear]
    """Weight's name -> the body's layer."""
    factors: Mapping[str, Factors]
    """Matrix -> what is kept of it."""
    deltas: Mapping[str, Tensor]
    """Other tensor -> (T, ...) task vectors."""
    telling: nn.Linear
    """The layer of the body by whose input tasks are told apart."""
    bases: Tensor
    """(T, k, n) float32 V_i^T of its weight."""
    all_tasks: Mapping[str, Tensor]
    """Tensor -> TSV-M of all tasks, up to that layer."""
    threshold: float
    most: int
    """Of tasks that are merged for an image."""
    chosen: Tensor
    """(B,) the likeliest task of each image of the last forward pass."""
    merged: list[Tasks] = field(default_factory=list[Tasks])
    """The tasks that were merged for each of these images."""
    _cores: dict[Tasks, dict[str, Tensor]] = field(default_factory=dict[Tasks, dict[str, Tensor]])

    @classmethod
    def around(
        cls,
        tower: nn.Module,
        factors: Mapping[str, Factors],
        deltas: Mapping[str, Tensor],
        telling: str,
        threshold: float,
        most: int,
    ) -> MassTower:
        """Puts it into a tower that has the base's weights already; `telling` names the weight that tells tasks apart."""
        own = dict(tower.named_parameters())
        like, bases = own[telling], factors[telling].right.float()
        body, tasks = body_of(tower), tuple(range(len(bases)))
        layers: dict[str, MassLinear] = {}
        for name in factors:
            layer = body.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, nn.Linear):
                layers[name] = MassLinear(layer, Factors(*(each.to(like.dtype) for each in factors[name])))
                put(body, name.rpartition(".")[0], layers[name])
        last = layer_of(telling) or 0
        all_tasks: dict[str, Tensor] = {}
        for name, value in own.items():
            if (layer_of(name) or 0) <= last:
                interrupts.check()
                all_tasks[name] = merged(name, value, factors, deltas, tasks)
        nobody = torch.zeros(0, dtype=torch.int64, device=like.device)
        found = cls(
            tower, body, layers, factors, deltas, layers[telling], bases, all_tasks, threshold, most, nobody
        )
        tower.forward = found.forward
        return found

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        """What TSV-M of each image's tasks gives."""
        probabilities = task_probabilities(self._class_tokens(pixel_values), self.bases)
        self.chosen = probabilities.argmax(1)
        self.merged = chosen_tasks(probabilities, self.threshold, self.most)
        found: list[tuple[Tensor, Any]] = []
        for tasks in dict.fromkeys(self.merged):
            images = torch.tensor([number for number, own in enumerate(self.merged) if own == tasks])
            images = images.to(pixel_values.device)
            found.append((images, self._of(tasks, pixel_values[images], options)))
        return joined(found)

    def _class_tokens(self, pixel_values: Tensor) -> Tensor:
        """(B, n) float32: what goes into the layer that tells tasks apart, in TSV-M of all tasks."""
        seen: list[Tensor] = []

        def look(_layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.append(given[0][:, 0].float())
            raise _Reached

        with self.telling.register_forward_pre_hook(look), contextlib.suppress(_Reached):
            functional_call(self.body, dict(self.all_tasks), (), {"pixel_values": pixel_values})
        return seen[0]

    def _of(self, tasks: Tasks, pixel_values: Tensor, options: Mapping[str, Any]) -> Any:
        """The output of TSV-M of some tasks."""
        cores = self._cores_of(tasks)
        others = {
            name: merged(name, value, self.factors, self.deltas, tasks)
            for name, value in self.body.named_parameters()
            if name not in self.layers
        }
        try:
            for name, layer in self.layers.items():
                layer.merged = tasks, cores[name]
            return functional_call(self.body, others, (), {"pixel_values": pixel_values, **options})
        finally:
            for layer in self.layers.values():
                layer.merged = None

    def _cores_of(self, tasks: Tasks) -> dict[str, Tensor]:
        """C of every layer; those that were used last are held."""
        found = self._cores.pop(tasks, None)
        if found is None:
            found = {
                name: core(*self.factors[name].of(tasks)).to(layer.weight.dtype)
                for name, layer in self.layers.items()
            }
            room = sum(each.nbytes for each in self.body.parameters()) - _size(found)
            while len(self._cores) >= LEAST and sum(map(_size, self._cores.values())) > room:
                del self._cores[next(iter(self._cores))]
        self._cores[tasks] = found
        return found

    def routes(self) -> Mapping[str, Tensor]:
        """`tower` -> (B, T) the share of each task in the merge of each image."""
        shares = self.bases.new_zeros(len(self.merged), len(self.bases))
        for row, tasks in zip(shares, self.merged, strict=True):
            row[list(tasks)] = 1 / len(tasks)
        return {"tower": shares}


def _size(cores: Mapping[str, Tensor]) -> int:
    return sum(each.nbytes for each in cores.values())


def merged(
    name: str,
    base: Tensor,
    factors: Mapping[str, Factors],
    deltas: Mapping[str, Tensor],
    tasks: Tasks,
) -> Tensor:
    """(...) TSV-M of some tasks, of one tensor, in the dtype of the base's."""
    if name in factors:
        left, right = factors[name].of(tasks)
        return (base + (left.double() @ core(left, right) @ right.double()).float()).to(base.dtype)
    return (base + deltas[name][list(tasks)].float().mean(0)).to(base.dtype)


def core(left: Tensor, right: Tensor) -> Tensor:
    """(K, K) float64 C with which L C R = P(U) S P(V)^T, TSV-M of tasks whose parts L = U S (O, K) and R = V^T (K, I) are side by side.

    K is small where few of many tasks are merged, and L and R are what the file has: so the merged matrix need never be made.
    """
    values = left.double().norm(dim=0)
    each = inverse(values)
    inner = inverse_root(left.double() * each) * values
    return each[:, None] * (inner @ inverse_root(right.T))


def task_probabilities(tokens: Tensor, bases: Tensor) -> Tensor:
    """(B, T) p of (B, I) class tokens, of (T, k, I) orthonormal rows V_i^T."""
    apart = (tokens - tokens @ bases.transpose(1, 2) @ bases).norm(dim=2).T  # (B, T)
    if len(bases) == 1:
        return apart.new_ones(apart.shape)
    scores = (apart.mean(1, keepdim=True) - apart) / (apart.std(1, keepdim=True) + 1e-6)
    return scores.softmax(1)


def chosen_tasks(probabilities: Tensor, threshold: float, most: int) -> list[tuple[int, ...]]:
    """S of each image, in the order of the tasks, of (B, T) p; of equally likely tasks the first come first."""
    order = probabilities.argsort(dim=1, descending=True, stable=True)[:, :most]
    likely = (probabilities.gather(1, order) > threshold).tolist()
    return [
        tuple(sorted(task for task, is_likely in zip(row, which, strict=True) if is_likely)) or (row[0],)
        for row, which in zip(order.tolist(), likely, strict=True)
    ]
