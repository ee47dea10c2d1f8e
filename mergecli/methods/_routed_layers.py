"""Multilayer perceptrons whose weights are put together anew for each image, or each batch of images.

Letters in shapes: B images, S tokens, d the tower's width, T tasks, n entries of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergecli.methods._bits import unpack
from mergecli.methods._mixture import Routing
from mergecli.methods._smile_layers import put

CHUNK = 1 << 27
"""Bytes of the images' own weights that are held at a time."""


SMALL = 1 << 17
"""Entries of task vectors, of biases for one, that are kept dense: making them so each time would drive out weights."""


class Scratch:
    """One tensor's task vectors at a time, made dense; layers take turns."""

    def __init__(self) -> None:
        self.owner: object = None
        self.dense: Tensor | None = None

    def take(self, owner: object, entries: int, like: Tensor) -> tuple[Tensor, bool]:
        """(entries,) room, and whether it still holds what the owner put there."""
        if self.dense is None or len(self.dense) < entries:
            self.dense = like.new_zeros(entries)
            self.owner = None
        held, self.owner = self.owner is owner, owner
        return self.dense[:entries], held


class Experts(nn.Module):
    """(T, n) task vectors of one tensor: dense, or as the entries that pruning has left."""

    values: Tensor
    places: Tensor | None

    def __init__(self, values: Tensor, bits: Tensor | None, entries: int, scratch: Scratch) -> None:
        """`values` (T, ...) all of them, or with `bits` (T, ceil(n / 8)) uint8 the (T, k) kept, padded with zeros."""
        super().__init__()
        self.tasks, self.entries, self.scratch = len(values), entries, scratch
        places = None
        if bits is not None:
            rows = [unpack(row, entries).nonzero()[:, 0] for row in bits]
            own = [each[: len(row)] for each, row in zip(values, rows, strict=True)]
            values = torch.cat(own)
            places = torch.cat([row + place * entries for place, row in enumerate(rows)])
            places = places.int() if self.tasks * entries < 1 << 31 else places
            if self.tasks * entries <= SMALL:
                values = values.new_zeros(self.tasks * entries).index_put_((places,), values)
                places, values = None, values.view(self.tasks, entries)
        self.register_buffer("values", values if places is not None else values.flatten(1), persistent=False)
        self.register_buffer("places", places, persistent=False)

    def stack(self) -> Tensor:
        """(T, n) all task vectors, valid until another tensor's are asked for."""
        if self.places is None:
            return self.values
        room, held = self.scratch.take(self, self.tasks * self.entries, self.values)
        if not held:
            room.zero_()[self.places] = self.values
        return room.view(self.tasks, self.entries)


class Mix(torch.autograd.Function):
    """base + coefficients times task vectors; keeps none of them for the way back."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, base: Tensor, experts: Experts) -> Tensor:
        """(B, n) of (B, T) coefficients and (n,) base."""
        ctx.experts = experts
        return torch.addmm(base[None], coefficients, experts.stack())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """(B, T): inner products with the task vectors."""
        return grads[0] @ ctx.experts.stack().T, None, None


class Router(nn.Module):
    """r(h) = A2 relu(A1 h + b1) + b2 for each token; or A h + b, or b alone."""

    def __init__(self, parameters: Mapping[str, Tensor], position: Tensor) -> None:
        """`parameters`: `0.weight`, `0.bias`, `1.weight`, ...; `position` (p,) is put before every token."""
        super().__init__()
        self.names = list(parameters)
        self.own = nn.ParameterList([nn.Parameter(value.float()) for value in parameters.values()])
        self.register_buffer("position", position, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T) the mean over the tokens of (B, S, d)."""
        own = dict(zip(self.names, self.own, strict=True))
        depth = sum(name.endswith("weight") for name in own)
        if depth == 0:
            return own["0.bias"].expand(len(hidden), -1)
        position = self.get_buffer("position")
        result = hidden.float()
        if len(position):
            result = torch.cat([position.expand(*hidden.shape[:2], -1), result], dim=2)
        for layer in range(depth):
            result = functional.linear(
                result.relu() if layer else result, own[f"{layer}.weight"], own[f"{layer}.bias"]
            )
        return result.mean(1)


class RoutedMlp(nn.Module):
    """A tower's `mlp` whose weights are the base's plus what the router weighs the task vectors with."""

    def __init__(self, mlp: Any, experts: Mapping[str, Experts], router: Router, routing: Routing) -> None:
        super().__init__()
        self.mlp, self.router, self.routing = mlp, router, routing
        self.experts = nn.ModuleDict({name.replace(".", "_"): each for name, each in experts.items()})
        self.shares = torch.zeros(0)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, d) of (B, S, d)."""
        shares = self.router(hidden)
        if self.routing == "batch":
            shares = shares.mean(0, keepdim=True)
        self.shares = shares.detach()
        shares = shares.to(hidden.dtype)
        inner = self.mlp.activation_fn(self._linear("fc1", hidden, shares))
        return self._linear("fc2", inner, shares)

    def _linear(self, name: str, inputs: Tensor, shares: Tensor) -> Tensor:
        """(B, S, m) of (B, S, n): each image with weights of its own, or all with the same."""
        layer: Any = getattr(self.mlp, name)
        if len(shares) == 1:
            return functional.linear(
                inputs,
                self._mixed(name, "weight", layer, shares)[0],
                self._mixed(name, "bias", layer, shares)[0],
            )
        many = max(1, CHUNK // (layer.weight.numel() * layer.weight.element_size()))
        results = [
            torch.baddbmm(
                self._mixed(name, "bias", layer, share)[:, None],
                part,
                self._mixed(name, "weight", layer, share).transpose(1, 2),
            )
            for part, share in zip(inputs.split(many), shares.split(many), strict=True)
        ]
        return torch.cat(results)

    def _mixed(self, name: str, kind: str, layer: Any, shares: Tensor) -> Tensor:
        """(B, ...) the weights or biases that (B, T) shares give."""
        base: Tensor = getattr(layer, kind)
        mixed: Any = Mix.apply(shares, base.detach().reshape(-1), self.experts[f"{name}_{kind}"])
        return mixed.view(len(shares), *base.shape)


@dataclass(frozen=True)
class RoutedTower:
    """A tower whose multilayer perceptrons route."""

    tower: nn.Module
    layers: Mapping[str, RoutedMlp]
    """Path in the tower -> what stands there."""
    parameters: Mapping[str, Tensor]
    """Key in the file -> a router's parameter."""

    @property
    def keeps_batches_whole(self) -> bool:
        """Whether the images of a batch share their weights."""
        return any(layer.routing == "batch" for layer in self.layers.values())

    def routes(self) -> Mapping[str, Tensor]:
        """Layer -> (B, T), or (1, T) where a batch shares them, of the last forward pass."""
        return {path: layer.shares for path, layer in self.layers.items()}

    def remove(self) -> None:
        """Puts the tower's own layers back."""
        for path, layer in self.layers.items():
            put(self.tower, path, layer.mlp)
