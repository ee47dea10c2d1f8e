"""Multilayer perceptrons whose weights are put together anew for each image, or each batch of images.

Letters in shapes: B images, S tokens, d the tower's width, T tasks, n inputs and m outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergecli.methods._expert_products import Dense, Pruned, linear
from mergecli.methods._mixture import Routing
from mergecli.methods._smile_layers import put


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

    def __init__(
        self,
        mlp: Any,
        experts: Sequence[Dense | Pruned],
        offsets: Sequence[Tensor],
        router: Router,
        routing: Routing,
    ) -> None:
        """`experts`: task vectors of the weights of `fc1` and `fc2`; `offsets`: (T, m) those of the biases."""
        super().__init__()
        self.mlp, self.router, self.routing = mlp, router, routing
        for name, own, offset in zip(("fc1", "fc2"), experts, offsets, strict=True):
            self.add_module(f"{name}_experts", own)
            self.register_buffer(f"{name}_offsets", offset, persistent=False)
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
        experts: Any = self.get_submodule(f"{name}_experts")
        weight, bias = layer.weight.detach(), layer.bias.detach()
        return linear(inputs, shares, weight, bias, experts, self.get_buffer(f"{name}_offsets"))


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
