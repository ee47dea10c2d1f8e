"""Masks of one bit an entry, and the entries that they leave."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def packed_size(entries: int) -> int:
    """Bytes of a mask."""
    return -(-entries // 8)


def pack(mask: Tensor) -> Tensor:
    """(T, ceil(n / 8)) uint8 of (T, ...) bool: eight entries a byte, the first in the highest bit."""
    import torch

    flat = mask.reshape(len(mask), -1)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).view(len(mask), -1, 8)
    result = flat[..., 0].to(torch.uint8)
    for bit in range(1, 8):
        result = result * 2 + flat[..., bit]
    return result


def unpack(bits: Tensor, entries: int) -> Tensor:
    """(T, n) bool of (T, ceil(n / 8)) uint8, or (n,) of one row."""
    import torch

    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :entries].bool()


class ContradictionError(ValueError):
    """The masks in a file are not those of the values beside them."""


def kept(key: str, bits: Tensor, values: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """(k,) the positions whose bit is set, ascending, and (k,) their values, of (ceil(n / 8),) bits and (at least k,)
    values padded with zeros; `key` is what messages call the bits.

    Raises:
        ContradictionError: there are more positions than values, or values without a position.
    """
    positions = unpack(bits, entries).nonzero()[:, 0]
    count, room = len(positions), len(values)
    if count > room:
        raise ContradictionError(
            f"`{key}`: expected at most {room} bits that are set, one for a value, got {count}"
        )
    if bool(values[count:].any()):
        raise ContradictionError(f"`{key}`: expected a bit for each value that is not 0, got {count}")
    return positions, values[:count]
