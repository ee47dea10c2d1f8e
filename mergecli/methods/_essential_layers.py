"""Linear layers that add the low-rank change of one task, chosen for each image by the mean of its tokens.

Letters in shapes: T tasks, B images, S tokens of an image, n inputs, m outputs, k the rank of a change.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergecli.methods._routed_linears import RoutedLinears


class EssentialRouter(nn.Module):
    """t = argmax_i cos(mean of the tokens, q_i), and A_t x.

    Queries, keys and values of a layer ask one router one after another, all with the same tensor: it answers once.
    """

    prototypes: Tensor
    """(T, n) q_i of length 1."""
    right: Tensor
    """(T, n, k) A_i, turned."""
    routes: Tensor
    """(B, T) 1 for the task of each image, else 0, in the last forward pass; (1, T) shares of tokens if a batch shared them."""

    def __init__(self, right: Tensor, prototypes: Tensor, by: Literal["sample", "batch"]) -> None:
        """`right` (T, k, n) as in the file."""
        super().__init__()
        self.by = by
        self.register_buffer("prototypes", functional.normalize(prototypes, dim=1), persistent=False)
        self.register_buffer("right", right.transpose(1, 2).contiguous(), persistent=False)
        self.register_buffer("routes", right.new_zeros(0, len(right)), persistent=False)
        self._asked: weakref.ref[Tensor] | None = None

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """(P,) the task of each part, and (P, Q, k) A_t x, of (B, S, n): a part is an image, or a position of all images."""
        if self._asked is None or self._asked() is not input:
            parts = input if self.by == "sample" else input.transpose(0, 1)
            # of tokens of any size the cosine with a prototype orders the tasks as the product does
            tasks = functional.linear(parts.mean(1), self.prototypes.to(input.dtype)).argmax(1)
            chosen = functional.one_hot(tasks, len(self.right)).to(input.dtype)
            self.routes = chosen if self.by == "sample" else chosen.mean(0, keepdim=True)
            self._asked, self._answer = weakref.ref(input), (tasks, torch.bmm(parts, self.right[tasks]))
        return self._answer


class EssentialLinear(nn.Linear):
    """W x + b + B_t A_t x.

    Weight and bias are those of the layer that it stands for, so that the tower's `state_dict` is what it was; what the
    tasks add are buffers that `state_dict` leaves out.
    """

    left: Tensor
    """(T, k, m) B_i, turned."""

    def __init__(self, linear: nn.Linear, left: Tensor, router: EssentialRouter) -> None:
        """`left` (T, m, k) as in the file."""
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")  # pyright: ignore[reportUnnecessaryComparison]
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.router = router
        self.register_buffer("left", left.transpose(1, 2).contiguous(), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(B, S, m) of (B, S, n)."""
        tasks, inner = self.router(input)
        result = functional.linear(input, self.weight, self.bias)
        if self.router.by == "sample":
            return torch.baddbmm(result, inner, self.left[tasks])
        return torch.baddbmm(result.transpose(0, 1), inner, self.left[tasks]).transpose(0, 1)


@dataclass(frozen=True)
class EssentialTower(RoutedLinears):
    """A tower some of whose linear layers route, and the layers that were there before."""

    routers: Mapping[str, EssentialRouter]
    """What routes -> its router."""

    @property
    def keeps_batches_whole(self) -> bool:
        """Whether the images of a batch are routed together."""
        return any(router.by == "batch" for router in self.routers.values())

    def routes(self) -> Mapping[str, Tensor]:
        """Layer -> (B, T) the task that each image was sent to in the last forward pass."""
        return {path: router.routes for path, router in self.routers.items()}
