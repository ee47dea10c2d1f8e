"""Products of tokens with weights that are put together for each image, or once for all of them.

Letters in shapes: B images, S tokens, T tasks, m outputs, n inputs, r rows of a weight.

Weights are merged and then multiplied: T m n + S m n multiplications for an image. To let each token pass through the
base and all task vectors, and to mix what comes out, would take (T + 1) S m n: with T = 8 and S = 50, ViT-B/32, nine
times as many as a plain layer, where merging takes 1.16 times as many. What takes long in merging is the way of B
weights to memory and back: hence a few rows of them at a time, which never leave the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK = 1 << 15
"""Entries of one weight that a processor puts together at a time, about."""
FEWEST = 16
"""Rows of one weight that a processor puts together at a time, at least: narrower products are slow."""
CACHE = 1 << 21
"""Bytes of the images' own weights that a processor holds at a time."""
CHUNK = 1 << 27
"""The same for other devices, which hold whole weights: they are slow at many small products."""


class Experts(Protocol):
    """(T, m, n) task vectors of one weight."""

    def blocks(self, images: int) -> Iterator[tuple[int, int, Tensor]]:
        """First row, end, and (T, r n) the rows between, which are valid until the next are asked for; as many at a
        time as are good for that many images."""
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
    """Task vectors of which the entries are held that pruning has left, block by block."""

    values: Tensor
    places: Tensor

    def __init__(self, kept: Sequence[tuple[Tensor, Tensor]], rows: int, columns: int) -> None:
        """`kept`: for each task (k,) ascending places in a weight of so many rows and columns, and (k,) values."""
        super().__init__()
        device = kept[0][0].device
        step = rows_of(rows, columns, device)
        self.shape, self.steps = (len(kept), columns), [*range(0, rows, step), rows]
        edges = torch.tensor(self.steps[1:-1], dtype=torch.long, device=device) * columns
        cuts = [torch.searchsorted(places, edges).tolist() for places, _ in kept]
        found: list[Tensor] = []
        values: list[Tensor] = []
        for cut, (places, own) in zip(cuts, kept, strict=True):
            found.extend(places.tensor_split(cut))
            values.extend(own.tensor_split(cut))
        blocks = len(self.steps) - 1
        order = [task * blocks + block for block in range(blocks) for task in range(len(kept))]
        shifts = [
            (task * (stop - start) - start) * columns
            for start, stop in zip(self.steps, self.steps[1:], strict=False)
            for task in range(len(kept))
        ]
        places = [(found[each] + shift).int() for each, shift in zip(order, shifts, strict=True)]
        counts = torch.tensor([len(each) for each in places]).view(blocks, -1).sum(1)
        self.counts: list[int] = counts.tolist()
        self.register_buffer("values", torch.cat([values[each] for each in order]), persistent=False)
        self.register_buffer("places", torch.cat(places), persistent=False)

    def blocks(self, images: int) -> Iterator[tuple[int, int, Tensor]]:
        del images
        tasks, columns = self.shape
        room = self.values.new_zeros(tasks * self.steps[1] * columns)
        parts = zip(self.values.split(self.counts), self.places.split(self.counts), strict=True)
        for start, stop, (values, places) in zip(self.steps, self.steps[1:], parts, strict=False):
            own = room[: tasks * (stop - start) * columns]
            own.zero_().index_copy_(0, places.long(), values)
            yield start, stop, own.view(tasks, -1)


def rows_of(rows: int, columns: int, device: torch.device) -> int:
    """r, of a weight of so many rows and columns."""
    if device.type != "cpu":
        return rows
    return min(rows, max(FEWEST, BLOCK // max(columns, 1) // FEWEST * FEWEST))


class Shared(torch.autograd.Function):
    """One weight that all images share: the base and a share of each task vector."""

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
        """(T,): inner products with the task vectors."""
        slopes = grads[0].contiguous()
        parts = (vectors @ slopes[start:stop].view(-1) for start, stop, vectors in ctx.experts.blocks(1))
        return torch.stack(list(parts)).sum(0), None, None


class Own(torch.autograd.Function):
    """Products of each image's tokens with its own weight. On the way back the weights are put together once more, so
    that none is kept meanwhile."""

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
        """(B, S, n) and (B, T)."""
        inputs, shares, base = ctx.saved_tensors
        back, slopes = torch.zeros_like(inputs), torch.zeros_like(shares)
        for rows, images, weights, vectors in _weights(shares, base, ctx.experts):
            given = grads[0][images, :, rows]  # (b, S, r)
            back[images] += given @ weights
            slopes[images] += (given.transpose(1, 2) @ inputs[images]).flatten(1) @ vectors.T
        return back, slopes, None, None


def _weights(shares: Tensor, base: Tensor, experts: Experts) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows, images, the (b, r, n) rows of those images' weights, and (T, r n) of the task vectors."""
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
