"""Linear layers that send each token to the experts whose input it resembles.

Letters in shapes: T tasks, N tokens of all images, B images, n inputs, m outputs, k the rank of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergecli.methods._routed_linears import RoutedLinears


class SmileLinear(nn.Linear):
    """W0 x + b0 + sum_i p_i (U_i S_i V_i^T x + b_i - b0), p for each token.

    Weight and bias are those of the layer that it stands for, so that the tower's `state_dict` is what it was; what the
    tasks add are buffers that `state_dict` leaves out.
    """

    left: Tensor
    """(T, k, m) U S, turned; or (T, n, m) whole matrices."""
    right: Tensor
    """(T, k, n) V^T; beside whole matrices only what tokens are compared with."""
    biases: Tensor | None
    """(T, m) b_i - b0."""
    routes: Tensor
    """(B, T) the mean over tokens of p in the last forward pass."""

    def __init__(
        self,
        linear: nn.Linear,
        left: Tensor,
        right: Tensor,
        biases: Tensor | None,
        gate_rank: int,
        experts_per_token: int,
    ) -> None:
        """`left` (T, m, k or n), `right` (T, k, n) and, of a layer with a bias, `biases` (T, m) as in the file."""
        super().__init__(linear.in_features, linear.out_features, bias=biases is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.gate_rank = gate_rank
        self.is_whole = left.shape[2] != right.shape[1]
        self.experts_per_token = experts_per_token
        self.register_buffer("left", left.to(self.weight).transpose(1, 2).contiguous(), persistent=False)
        self.register_buffer("right", right.to(self.weight).contiguous(), persistent=False)
        self.register_buffer("biases", None if biases is None else biases.to(self.weight), persistent=False)
        self.register_buffer("routes", self.weight.new_zeros(0, len(left)), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(B, ..., m) of (B, ..., n)."""
        tokens = input.reshape(-1, self.in_features)
        shares = self.shares(tokens)
        self.routes = shares.detach().view(len(input), -1, len(self.right)).mean(1)
        result = functional.linear(tokens, self.weight, self.bias)
        if self.biases is not None:
            result = result + shares @ self.biases
        few = self.experts_per_token < len(self.right)
        result = result + (self.each_expert(tokens, shares) if few else self.all_experts(tokens, shares))
        return result.view(*input.shape[:-1], self.out_features)

    def shares(self, tokens: Tensor) -> Tensor:
        """(N, T) p: the softmax of |V_i^T x|, V_i cut to `gate_rank` columns, over a token's best experts; else 0."""
        gate = self.right[:, : self.gate_rank].flatten(0, 1)
        scores = functional.linear(tokens, gate).view(len(tokens), len(self.right), -1).norm(dim=2)  # (N, T)
        best = scores.topk(min(self.experts_per_token, len(self.right)), dim=1)
        return torch.zeros_like(scores).scatter_(1, best.indices, best.values.softmax(dim=1))

    def each_expert(self, tokens: Tensor, shares: Tensor) -> Tensor:
        """(N, m) what the experts add: each computes its own tokens only."""
        result = tokens.new_zeros(len(tokens), self.out_features)
        for left, right, share in zip(self.left, self.right, shares.T, strict=True):
            own = share.nonzero()[:, 0]
            inner = self._inner(tokens.index_select(0, own), right) * share[own, None]
            result.index_add_(0, own, inner @ left)
        return result

    def _inner(self, tokens: Tensor, right: Tensor) -> Tensor:
        """(N, k) what `left` is for, of (N, n) tokens: V^T x, or x itself."""
        return tokens if self.is_whole else functional.linear(tokens, right)

    def all_experts(self, tokens: Tensor, shares: Tensor) -> Tensor:
        """(N, m) what the experts add: all compute all tokens at once."""
        inner = self._inner(tokens, self.right.flatten(0, 1))
        inner = inner[:, None] if self.is_whole else inner.view(len(tokens), len(self.right), -1)
        return (inner * shares[..., None]).flatten(1) @ self.left.flatten(0, 1)


@dataclass(frozen=True)
class SmileTower(RoutedLinears):
    """A tower whose linear layers route, and the layers that were there before."""

    @property
    def keeps_batches_whole(self) -> bool:
        """No: every token has its own weights."""
        return False

    def routes(self) -> Mapping[str, Tensor]:
        """Layer -> (B, T) the mean over each image's tokens of their weights, in the last forward pass."""
        layers = {path: self.tower.get_submodule(path) for path in self.replaced}
        return {path: layer.routes for path, layer in layers.items() if isinstance(layer, SmileLinear)}
