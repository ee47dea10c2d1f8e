from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergecli.formats.quantizer import (
    BITS,
    PER,
    Per,
    Steps,
    dequantize,
    pack,
    packed_bytes,
    quantize,
    row_count,
    unpack,
)


def there_and_back(values: Tensor, bits: int, per: Per) -> tuple[Tensor, Tensor]:
    """The values as they are read, and the step of each."""
    quantized = quantize(values, bits, per)
    steps = Steps.of(quantized.scale, quantized.zero, values.numel())
    into = torch.empty(values.numel())
    dequantize(lambda first, last: quantized.codes[first:last], bits, into, 0, steps)
    return into.view(values.shape), quantized.scale.repeat_interleave(steps.row).view(values.shape)


def awkward() -> Tensor:
    """Rows of every kind: usual, one-sided, constant, of zeros, with zeros, tiny and huge."""
    rows = torch.randn(12, 37, generator=torch.Generator().manual_seed(0)) * 1e-3
    rows[1] = rows[1].abs()
    rows[2] = -rows[2].abs()
    rows[3], rows[4], rows[5] = 0.0, 0.25, -0.125
    rows[6, ::2] = 0.0
    rows[7] *= 1e-38
    rows[8] *= 1e38
    rows[9] = torch.linspace(-1, 1, 37) * 3e38
    return rows


@pytest.mark.parametrize("bits", BITS)
def test_codes_of_every_length_are_packed_and_come_back(bits: int) -> None:
    for count in (0, 1, 7, 8, 9, 1001):
        codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
        packed = pack(codes, bits)
        assert len(packed) == packed_bytes(count, bits) == -(-count // 8) * bits
        assert unpack(packed, bits)[:count].equal(codes)


def test_codes_are_packed_little_end_first() -> None:
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8), 4).tolist() == [
        0x21,
        0x43,
        0x65,
        0x87,
    ]
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00_11_10_01, 0]
    three = pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 3).tolist()
    assert sum(byte << 8 * place for place, byte in enumerate(three)) == sum(
        code << 3 * place for place, code in enumerate([1, 2, 3, 4, 5, 6, 7, 0])
    )


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("bits", BITS)
def test_no_entry_is_further_off_than_half_a_step_and_zeros_stay_zeros(bits: int, per: Per) -> None:
    values = awkward() if per == "row" else awkward()[:7]
    got, step = there_and_back(values, bits, per)
    assert bool(((got - values).abs().double() <= step.double() * (0.5 + 1e-4)).all())
    assert not bool(got[values == 0].any())


@pytest.mark.parametrize("bits", BITS)
def test_constant_rows_and_rows_of_zeros_are_kept(bits: int) -> None:
    values = awkward()[3:6]
    got, _ = there_and_back(values, bits, "row")
    torch.testing.assert_close(got, values, rtol=1e-6, atol=0)


def test_whole_numbers_that_fill_the_codes_come_back_exactly() -> None:
    for values in (torch.arange(256.0), torch.arange(-100.0, 156.0)):
        got, step = there_and_back(values, 8, "row")
        assert got.equal(values)
        assert float(step[0]) == 1


@pytest.mark.parametrize("bits", [4, 3])
def test_any_block_has_the_values_of_the_whole(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergecli.formats.quantizer.PIECE", 32)
    values = awkward()
    whole, _ = there_and_back(values, bits, "row")
    quantized = quantize(values, bits, "row")
    steps = Steps.of(quantized.scale, quantized.zero, values.numel())
    for start, stop in ((0, 1), (5, 37), (37, 74), (30, 40), (36, 200), (100, 444)):
        into = torch.empty(stop - start)
        dequantize(lambda first, last: quantized.codes[first:last], bits, into, start, steps)
        assert into.equal(whole.flatten()[start:stop])


def test_a_row_is_one_of_a_matrix_or_of_stacked_ones_a_filter_or_a_vector() -> None:
    shapes = ((), (9,), (9, 4), (2, 9, 4), (9, 4, 3, 3))
    assert [row_count(shape, "row") for shape in shapes] == [1, 1, 9, 18, 9]
    assert [row_count(shape, "tensor") for shape in ((9,), (9, 4))] == [1, 1]
