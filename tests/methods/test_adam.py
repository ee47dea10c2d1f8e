"""Adam for one matrix."""

from __future__ import annotations

import torch

from mergecli.methods._adam import adam


def test_adam_is_torchs_own() -> None:
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([wanted], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        (wanted - target).pow(4).sum().backward()
        optimizer.step()
    got = adam(torch.zeros(4, 3, dtype=torch.float64), lambda at: 4 * (at - target) ** 3, 0.05, 30)
    torch.testing.assert_close(got, wanted.detach(), atol=1e-12, rtol=0)
