"""The asymmetric uniform quantizer of task vectors, and codes of a few bits packed into bytes.

TVQ (Kim et al., ICCV 2025, arXiv 2503.06921), for each row or tensor x and b bits:

step   D = (max - min) / (2^b - 1), the range widened to contain 0
zero   z = round(-min / D)
codes  q = clamp(round(x / D) + z, 0, 2^b - 1)
value  D (q - z)

No entry is further than D / 2 from its value, and 0 stays 0. A constant is one end of its range, and kept to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

BITS = (8, 4, 3, 2)
"""How many bits a code may have."""

Per = Literal["row", "tensor"]
"""What shares a step and a zero: what belongs to one index of a tensor's first dimension (a vector is one row), or all of it."""

PER: tuple[Per, ...] = ("row", "tensor")

GROUP = 8
"""Codes that are packed together, into as many bytes as a code has bits: the first in the lowest bits."""


@dataclass(frozen=True)
class Quantized:
    """A tensor as codes: packed (see `pack`), with a float32 step and a uint8 zero for each row."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def row_count(shape: tuple[int, ...], per: Per) -> int:
    """How many steps a tensor of this shape has."""
    return shape[0] if per == "row" and len(shape) > 1 else 1


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


def dequantize(into: Tensor, start: int, scale: Tensor, zero: Tensor, row: int) -> None:
    """Turns codes into values, in place.

    Args:
        into: (n,) float32 codes of the flattened tensor from entry `start` on.
        scale, zero: (rows, 1) float32.
        row: entries of a row.
    """
    for low, high in _within_rows(start, start + len(into), row):
        part = into[low - start : high - start].view(-1, min(row, high - low))
        first = low // row
        of = slice(first, first + len(part))
        part.sub_(zero[of]).mul_(scale[of])


def _within_rows(start: int, stop: int, row: int) -> Iterator[tuple[int, int]]:
    """The end of a row, whole rows, and the beginning of one, as far as there are such between `start` and `stop`."""
    ends = {start, min(stop, -(-start // row) * row), max(start, stop // row * row), stop}
    return pairwise(sorted(ends))


def pack(codes: Tensor, bits: int) -> Tensor:
    """(ceil(n / 8) bits,) uint8 of (n,) uint8 codes below 2^bits; what the last group lacks is 0."""
    import torch

    padded: Any = torch.nn.functional.pad(codes, (0, -len(codes) % GROUP)).numpy()
    words = padded.view("<u8")
    for width in (8, 16, 32):
        words = (words | words >> _gap(width, bits)) & _mask(2 * width, bits)
    return torch.from_numpy(words.view("u1").reshape(-1, GROUP)[:, :bits].flatten())


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(n,) uint8 codes of whole groups that were packed."""
    import numpy as np
    import torch

    data: Any = packed.numpy()
    if bits == 3:  # there are no numbers of three bytes
        wide = np.zeros((len(data) // bits, GROUP), "u1")
        wide[:, :bits] = data.reshape(-1, bits)
        words = wide.reshape(-1).view("<u8")
    else:
        words = data.view(f"<u{bits}").astype("<u8")
    for width in (32, 16, 8):
        words |= words << _gap(width, bits)
        words &= _mask(width, bits)
    return torch.from_numpy(words.view("u1"))


def _gap(width: int, bits: int) -> Any:
    """Of lanes of so many bits, those above what the lane's codes (one for every 8 bits of it) take."""
    import numpy as np

    return np.uint64(width - width // 8 * bits)


def _mask(width: int, bits: int) -> Any:
    """The bits of a word that its codes take, in lanes of so many bits."""
    import numpy as np

    return np.uint64(sum((1 << width // 8 * bits) - 1 << lane for lane in range(0, 64, width)))
