"""Multilayer perceptrons whose weights are put together for each image, or for each batch of images.

Letters in shapes: B images, S tokens, d the tower's width, T tasks, n inputs and m outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from mergecli.methods._mixture import Routing
from mergecli.methods._routed_linears import put

BLOCK = 1 << 15
"""Entries of one weight that a processor puts together at a time, about."""
FEWEST = 16
"""Rows of one weight that a processor puts together at a time, at least: products of fewer rows are slow."""
CACHE = 1 << 21
"""Bytes of the images' own weights that a processor holds at a time: they stay in its cache between the two products."""
CHUNK = 1 << 27
"""The same for other devices, which put together whole weights: many small products would keep them waiting."""


class Experts(Protocol):
    """(T, m, n) task vectors of one weight."""

    def blocks(self, images: int) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, end, (T, r n) the task vectors' rows between), valid until the next block is asked for.

        Args:
            images: how many images the weights are put together for, which decides how many rows are good at a time.
        """
        ...


class Dense(nn.Module):
    """Task vectors of which every entry is held."""

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        """`values` (T, m, n)."""
        super().__init__()
        self.register_buffer("values", values, persistent=False)

    def blocks(self, images: int) -> Iterator[tuple[int, int, Tensor]]:
        _, total, columns = self.values.shape
        rows = rows_of(total, columns, self.values.device) if images > 1 else total
        for start in range(0, total, max(rows, 1)):
            part = self.values[:, start : start + rows]
            yield start, start + part.shape[1], part.flatten(1)


class Pruned(nn.Module):
    """Task vectors of which only the entries are held that pruning has left.

    A block of rows of all tasks is filled in when it is needed, so that on a CPU no whole task vector is ever in memory.
    """

    values: Tensor
    positions: Tensor

    def __init__(self, kept: Sequence[tuple[Tensor, Tensor]], rows: int, columns: int) -> None:
        """The task vectors of a weight of so many rows and columns.

        Args:
            kept: for each task (k,) ascending positions in the flattened weight, and (k,) values.
        """
        super().__init__()
        # `blocks` fills one (T, r n) block of all tasks with a single `index_copy_`. So values are stored block by block
        # and, in a block, task by task; a position is one in that flattened (T, r n) block, no longer one in the weight.
        device = kept[0][0].device
        step = rows_of(rows, columns, device)
        self.shape, self.steps = (len(kept), columns), [*range(0, rows, step), rows]
        edges = torch.tensor(self.steps[1:-1], dtype=torch.long, device=device) * columns
        cuts = [torch.searchsorted(positions, edges).tolist() for positions, _ in kept]  # positions ascend
        found: list[Tensor] = []
        values: list[Tensor] = []
        for cut, (positions, own) in zip(cuts, kept, strict=True):
            found.extend(positions.tensor_split(cut))
            values.extend(own.tensor_split(cut))
        blocks = len(self.steps) - 1
        order = [task * blocks + block for block in range(blocks) for task in range(len(kept))]
        # position in the weight - start * columns is that in the block's rows; each task has (stop - start) * columns entries
        shifts = [
            (task * (stop - start) - start) * columns
            for start, stop in zip(self.steps, self.steps[1:], strict=False)
            for task in range(len(kept))
        ]
        # int32 is half of int64's memory, and a block is far smaller than 2^31 entries
        positions = [(found[each] + shift).int() for each, shift in zip(order, shifts, strict=True)]
        counts = torch.tensor([len(each) for each in positions]).view(blocks, -1).sum(1)
        self.counts: list[int] = counts.tolist()
        self.register_buffer("values", torch.cat([values[each] for each in order]), persistent=False)
        self.register_buffer("positions", torch.cat(positions), persistent=False)

    def blocks(self, images: int) -> Iterator[tuple[int, int, Tensor]]:
        del images
        tasks, columns = self.shape
        room = self.values.new_zeros(tasks * self.steps[1] * columns)
        parts = zip(self.values.split(self.counts), self.positions.split(self.counts), strict=True)
        for start, stop, (values, positions) in zip(self.steps, self.steps[1:], parts, strict=False):
            own = room[: tasks * (stop - start) * columns]
            own.zero_().index_copy_(0, positions.long(), values)
            yield start, stop, own.view(tasks, -1)


def rows_of(rows: int, columns: int, device: torch.device) -> int:
    """r, how many rows of a weight of this size are put together at a time."""
    if device.type != "cpu":
        return rows
    return min(rows, max(FEWEST, BLOCK // max(columns, 1) // FEWEST * FEWEST))


class Shared(torch.autograd.Function):
    """One weight that all images share: the base and a share of each task vector.

    Autograd would keep all task vectors of a `Pruned` weight for the way back; this fills them in once more instead.
    """

    @staticmethod
    def forward(ctx: Any, shares: Tensor, base: Tensor, experts: Experts) -> Tensor:
        """(m, n) of (T,) shares and (m, n) base."""
        ctx.experts = experts
        result = torch.empty_like(base)
        for start, stop, vectors in experts.blocks(1):
            torch.addmv(base[start:stop].view(-1), vectors.T, shares, out=result[start:stop].view(-1))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """(T,) gradient of the shares: inner products of the weight's gradient with the task vectors."""
        gradients = grads[0].contiguous()
        parts = (vectors @ gradients[start:stop].view(-1) for start, stop, vectors in ctx.experts.blocks(1))
        return torch.stack(list(parts)).sum(0), None, None


class Own(torch.autograd.Function):
    """Products of each image's tokens with its own weight.

    Autograd would keep every image's weight, each as large as the layer's. Instead the backward pass puts the weights
    together once more, a few rows of a few images at a time, as the forward pass does.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, shares: Tensor, base: Tensor, experts: Experts) -> Tensor:
        """(B, S, m) of (B, S, n) inputs, (B, T) shares and (m, n) base."""
        ctx.save_for_backward(inputs, shares, base)
        ctx.experts = experts
        result = inputs.new_empty(*inputs.shape[:2], len(base))
        for rows, images, weights, _ in _weights(shares, base, experts):
            torch.bmm(inputs[images], weights.transpose(1, 2), out=result[images, :, rows])
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """(B, S, n) gradient of the inputs and (B, T) of the shares."""
        inputs, shares, base = ctx.saved_tensors
        back, gradients = torch.zeros_like(inputs), torch.zeros_like(shares)
        for rows, images, weights, vectors in _weights(shares, base, ctx.experts):
            given = grads[0][images, :, rows]  # (b, S, r)
            back[images] += given @ weights
            gradients[images] += (given.transpose(1, 2) @ inputs[images]).flatten(1) @ vectors.T
        return back, gradients, None, None


def _weights(shares: Tensor, base: Tensor, experts: Experts) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(rows, images, (b, r, n) those rows of those images' weights, (T, r n) of the task vectors), until all are met."""
    columns, on_cpu = base.shape[1], base.device.type == "cpu"
    for start, stop, vectors in experts.blocks(len(shares)):
        own = base[start:stop]
        room = (CACHE if on_cpu else CHUNK) // max(1, own.numel() * own.element_size())
        many = max(1, room)
        for first in range(0, len(shares), many):
            images = slice(first, first + many)
            mixed = torch.addmm(own.reshape(1, -1), shares[images], vectors)
            yield slice(start, stop), images, mixed.view(-1, stop - start, columns), vectors


def linear(
    inputs: Tensor, shares: Tensor, weight: Tensor, bias: Tensor, experts: Experts, offsets: Tensor
) -> Tensor:
    """(B, S, m) of (B, S, n) inputs and (B, T) shares, or (1, T) that all images share.

    Args:
        experts: task vectors of the (m, n) weight.
        offsets: (T, m) those of the bias.
    """
    biases = torch.addmm(bias[None], shares, offsets)  # (B, m)
    if len(shares) == 1:
        shared: Any = Shared.apply(shares[0], weight, experts)
        return functional.linear(inputs, shared, biases[0])
    own: Any = Own.apply(inputs, shares, weight, experts)
    return own + biases[:, None]


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


class WholeVectors(nn.Module):
    """What the tasks add to a linear layer: task vectors of weight and bias."""

    offsets: Tensor

    def __init__(self, experts: Dense | Pruned, offsets: Tensor) -> None:
        """`experts` of the (m, n) weight, `offsets` (T, m) of the bias."""
        super().__init__()
        self.experts = experts
        self.register_buffer("offsets", offsets, persistent=False)

    def product(self, inputs: Tensor, shares: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(B, S, m) of (B, S, n) inputs, and (B, T) shares or (1, T) that all images have."""
        return linear(inputs, shares, weight, bias, self.experts, self.offsets)


class RankOnes(nn.Module):
    """What the tasks add to a linear layer: matrices of rank one, of which none is ever written down.

    K is T times the number of matrices of a task.
    """

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor) -> None:
        """`left` (K, m) and `right` (K, n): matrix k is the outer product of their rows k."""
        super().__init__()
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def product(self, inputs: Tensor, shares: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(B, S, m) of (B, S, n) inputs, and (B, K) shares or (1, K) that all images have."""
        inner = functional.linear(inputs, self.right) * shares[:, None]
        return functional.linear(inputs, weight, bias) + inner @ self.left


def largest(shares: Tensor, count: int) -> Tensor:
    """(B, K) shares of which those below the `count` largest of an image are nearly 0: g sigmoid(100 (g - least)), so
    that the least of them is halved; all as they are if `count` is 0 or at least K."""
    if not 0 < count < shares.shape[1]:
        return shares
    least = shares.topk(count, dim=1).values[:, -1:]
    return shares * (100 * (shares - least)).sigmoid()


class RoutedMlp(nn.Module):
    """A tower's `mlp` whose weights are the base's plus what the tasks add, each times its routing weight."""

    def __init__(
        self,
        mlp: Any,
        parts: Sequence[WholeVectors | RankOnes],
        router: Router,
        routing: Routing,
        tasks: int,
        best: int = 0,
    ) -> None:
        """`parts`: what the tasks add to `fc1` and `fc2`; `best`: how many routing weights count, 0 for all."""
        super().__init__()
        self.mlp, self.router, self.routing, self.tasks, self.best = mlp, router, routing, tasks, best
        self.parts = nn.ModuleList(parts)
        self.shares = torch.zeros(0)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, d) of (B, S, d)."""
        shares = self.router(hidden)
        if self.routing == "batch":
            shares = shares.mean(0, keepdim=True)
        shares = largest(shares, self.best)
        self.shares = shares.detach().unflatten(1, (self.tasks, -1)).mean(2)
        shares = shares.to(hidden.dtype)
        inner = self.mlp.activation_fn(self._linear(0, hidden, shares))
        return self._linear(1, inner, shares)

    def _linear(self, place: int, inputs: Tensor, shares: Tensor) -> Tensor:
        """(B, S, m) of (B, S, n): each image with weights of its own, or all with the same."""
        layer: Any = self.mlp.fc2 if place else self.mlp.fc1
        part: Any = self.parts[place]
        return part.product(inputs, shares, layer.weight.detach(), layer.bias.detach())


@dataclass(frozen=True)
class RoutedTower:
    """A tower whose multilayer perceptrons route."""

    tower: nn.Module
    layers: Mapping[str, RoutedMlp]
    """Path in the tower -> what stands there."""
    parameters: Mapping[str, Tensor]
    """Key in the file -> a router's parameter."""

    @property
    def chosen(self) -> None:
        """Nothing: layers decide for themselves."""
        return None

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
