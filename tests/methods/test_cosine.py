"""Inner products and cosines of whole tensors."""

from __future__ import annotations

import torch

from mergecli.methods._cosine import cosines, inner_products


def test_cosines_are_those_of_long_vectors_and_zero_without_a_direction() -> None:
    rows = torch.randn(4, 300, 301, generator=torch.Generator().manual_seed(1))  # longer than a step of 65536
    rows[2], rows[3] = 3 * rows[0], 0
    flat = rows.flatten(1).double()
    products = inner_products(rows)
    torch.testing.assert_close(products, flat @ flat.T, atol=1e-6, rtol=0)
    found = cosines(products)
    want = torch.nn.functional.cosine_similarity(flat[:3, None], flat[None, :3], dim=-1)
    torch.testing.assert_close(found[:3, :3], want, atol=1e-12, rtol=0)
    assert float((found.diagonal()[:3] - 1).abs().max()) < 1e-15
    assert not found[3].any()
