"""The asymmetric uniform quantizer of task vectors, and codes of a few bits packed into bytes.

TVQ (Kim et al., ICCV 2025, arXiv 2503.06921), for each row or tensor x and b bits:

step   D = (max - min) / (2^b - 1), the range widened to contain 0
zero   z = round(-min / D)
codes  q = clamp(round(x / D) + z, 0, 2^b - 1)
value  D (q - z)

No entry is further than D / 2 from its value, and 0 stays 0. A constant is one end of its range, and kept to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

BITS = (8, 4, 3, 2)
"""How many bits a code may have."""

Per = Literal["row", "tensor"]
"""What shares a step and a zero: a row of a matrix or of stacked matrices, a filter, a vector; or the whole tensor."""

PER: tuple[Per, ...] = ("row", "tensor")

GROUP = 8
"""Codes that are packed together, into as many bytes as a code has bits: the first in the lowest bits."""


PIECE = 1 << 16
"""Codes that are read and unpacked at a time, so that what that needs is small beside a block of entries; whole groups."""


@dataclass(frozen=True)
class Quantized:
    """A tensor as codes: packed (see `pack`), with a float32 step and a uint8 zero for each row."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def row_count(shape: tuple[int, ...], per: Per) -> int:
    """How many steps a tensor of this shape has."""
    if per == "tensor" or len(shape) < 2:
        return 1
    return math.prod(shape[:-1]) if len(shape) < 4 else shape[0]


def packed_bytes(entries: int, bits: int) -> int:
    """Bytes of so many codes."""
    return -(-entries // GROUP) * bits


def quantize(values: Tensor, bits: int, per: Per) -> Quantized:
    """The codes of a float32 tensor that has entries, all finite, and a range that float32 has."""
    import torch

    rows, levels = values.reshape(row_count(tuple(values.shape), per), -1), 2**bits - 1
    low, high = rows.amin(1).double().clamp_(max=0), rows.amax(1).double().clamp_(min=0)
    step = (high - low) / levels
    scale = step.float()
    # rounded up: the codes must reach both ends
    scale = torch.where(
        scale.double() < step, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale
    )
    divisor = torch.where(scale > 0, scale, 1.0)  # of rows of zeros the step is 0
    zero = (-low / divisor).round_().clamp_(max=levels).float()
    codes = (rows / divisor[:, None]).round_().add_(zero[:, None]).clamp_(0, levels)
    return Quantized(pack(codes.to(torch.uint8).flatten(), bits), scale, zero.to(torch.uint8))


@dataclass(frozen=True)
class Steps:
    """The steps of one tensor."""

    scale: Tensor
    """(rows, 1) float32; the same of `zero`."""
    zero: Tensor
    row: int
    """Entries of a row, at least 1."""

    @classmethod
    def of(cls, scale: Tensor, zero: Tensor, entries: int) -> Steps:
        """Of (rows,) scales and zeros of a tensor of so many entries."""
        return cls(scale[:, None], zero.float()[:, None], max(entries // max(len(scale), 1), 1))


def dequantize(read: Callable[[int, int], Tensor], bits: int, into: Tensor, start: int, steps: Steps) -> None:
    """Values of packed codes.

    Args:
        read: `read(first, last)` gives these bytes of the packed tensor.
        into: (n,) float32, for the values from entry `start` of the flattened tensor on.
    """
    stop, row = start + len(into), steps.row
    for at in range(start // GROUP * GROUP, stop, PIECE):
        first, last = max(at, start), min(at + PIECE, stop)
        codes = unpack(read(at // GROUP * bits, -(-last // GROUP) * bits), bits)
        into[first - start : last - start].copy_(codes[first - at : last - at])
    for low, high in _within_rows(start, stop, row):
        part = into[low - start : high - start].view(-1, min(row, high - low))
        of = slice(low // row, low // row + len(part))
        part.sub_(steps.zero[of]).mul_(steps.scale[of])


def _within_rows(start: int, stop: int, row: int) -> Iterator[tuple[int, int]]:
    """The end of a row, whole rows, and the beginning of one, as far as there are such between `start` and `stop`."""
    ends = {start, min(stop, -(-start // row) * row), max(start, stop // row * row), stop}
    return pairwise(sorted(ends))


def pack(codes: Tensor, bits: int) -> Tensor:
    """(ceil(n / 8) bits,) uint8 of (n,) uint8 codes below 2^bits; what the last group lacks is 0."""
    import torch

    padded: Any = torch.nn.functional.pad(codes, (0, -len(codes) % GROUP)).numpy()
    word = _word(bits)
    words = padded.view(f"<u{word.codes}")
    for gap, _, mask in word.steps:
        words = (words | words >> gap) & mask
    return torch.from_numpy(words.view("u1").reshape(-1, word.codes)[:, : word.bytes].flatten())


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(n,) uint8 codes of whole groups that were packed."""
    import numpy as np
    import torch

    data: Any = packed.numpy()
    word = _word(bits)
    if word.bytes == 1:
        words = data.astype(f"<u{word.codes}", copy=False)
    else:  # 3: there are no numbers of three bytes
        wide = np.zeros((len(data) // word.bytes, word.codes), "u1")
        wide[:, : word.bytes] = data.reshape(-1, word.bytes)
        words = wide.reshape(-1).view(f"<u{word.codes}")
    for gap, mask, _ in reversed(word.steps):
        words |= words << gap
        words &= mask
    return torch.from_numpy(words.view("u1"))


class _Word(NamedTuple):
    """The fewest codes that fill whole bytes: a number that has a byte for each of them, and is packed into fewer."""

    codes: int
    bytes: int
    steps: tuple[tuple[Any, Any, Any], ...]
    """Of packing. Each puts neighboring lanes together, first those of 8 bits, which have a code each: the bits that are free
    at the end of a lane, those that codes take before the step, and after it."""


@cache
def _word(bits: int) -> _Word:
    import numpy as np

    codes = GROUP // math.gcd(GROUP, bits)

    def mask(width: int) -> int:
        return sum((1 << width // 8 * bits) - 1 << lane for lane in range(0, 8 * codes, width))

    kind, widths = np.dtype(f"<u{codes}").type, [8 << step for step in range(codes.bit_length() - 1)]
    steps = tuple((kind(w - w // 8 * bits), kind(mask(w)), kind(mask(2 * w))) for w in widths)
    return _Word(codes, codes * bits // 8, steps)
