"""Masks of one bit an entry."""

from __future__ import annotations

import pytest
import torch

from mergecli.methods._bitmasks import ContradictionError, kept, pack, packed_size, unpack


@pytest.mark.parametrize("entries", [0, 1, 7, 8, 9, 5000])
def test_masks_come_back_from_bits(entries: int) -> None:
    mask = torch.rand(3, entries, generator=torch.Generator().manual_seed(1)) < 0.5
    bits = pack(mask)
    assert bits.shape == (3, packed_size(entries))
    assert unpack(bits, entries).equal(mask)
    assert unpack(bits[1], entries).equal(mask[1])


def test_values_go_where_the_bits_are_set_and_must_be_as_many() -> None:
    bits = pack(torch.tensor([[False, True, False, True, True]]))[0]
    places, values = kept("m", bits, torch.tensor([5.0, 6, 7, 0]), 5)
    assert (places.tolist(), values.tolist()) == ([1, 3, 4], [5, 6, 7])
    with pytest.raises(ContradictionError, match="`m`: expected at most 2 bits that are set"):
        kept("m", bits, torch.tensor([5.0, 6]), 5)
    with pytest.raises(ContradictionError, match="`m`: expected a bit for each value that is not 0, got 3"):
        kept("m", bits, torch.tensor([5.0, 6, 7, 8]), 5)
