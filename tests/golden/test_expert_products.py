"""Products with weights that are put together for each image, against weights that are written down."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mergecli.methods import _wemoe_layers as _expert_products
from mergecli.methods._wemoe_layers import Dense, Pruned, linear

T, M, N, B, S = 3, 23, 5, 7, 4


@pytest.fixture(params=[(1, 1), (1, 5), (40, 1), (1 << 15, 16)])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one row, of five, which do not divide 23, of eight, and of all."""
    entries, fewest = request.param
    monkeypatch.setattr(_expert_products, "BLOCK", entries)
    monkeypatch.setattr(_expert_products, "FEWEST", fewest)
    monkeypatch.setattr(
        _expert_products, "CACHE", 8 * 5 * N * 2
    )  # two images at a time where blocks have five rows


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def pruned(vectors: Tensor) -> Pruned:
    """The entries that are not 0."""
    rows: Sequence[Tensor] = vectors.flatten(1).unbind()
    return Pruned([(row.nonzero()[:, 0], row[row != 0]) for row in rows], *vectors.shape[1:])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("images", [1, B])
@pytest.mark.parametrize("kind", [Dense, pruned])
def test_products_and_slopes_are_those_of_weights_that_are_written_down(
    kind: type[Dense], images: int, density: float
) -> None:
    keep = torch.rand(T, M, N, generator=torch.Generator().manual_seed(5)) < density
    vectors, offsets, weight, bias = numbers(T, M, N) * keep, numbers(T, M), numbers(M, N), numbers(M)
    inputs, shares = numbers(B, S, N).requires_grad_(True), numbers(images, T).requires_grad_(True)
    got = linear(inputs, shares, weight, bias, kind(vectors), offsets)
    mixed = weight + torch.einsum("bt,tmn->bmn", shares, vectors)
    want = torch.einsum("bsn,bmn->bsm", inputs, mixed.expand(B, M, N)) + (bias + shares @ offsets)[:, None]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    slope = numbers(B, S, M)
    found = torch.autograd.grad(got, (inputs, shares), slope)
    expected = torch.autograd.grad(want, (inputs, shares), slope)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
