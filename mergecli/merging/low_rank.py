"""Changes of weights cut to a low rank, and what each loses by it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergecli.methods._svd import decompose

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Change:
    """Squared norms of a tensor's change and of what is lost of it, and the factors that are kept."""

    norm: float
    lost: float
    factors: tuple[Tensor, Tensor] | None = None
    """(O, k) and (k, I)."""

    @property
    def rank(self) -> int:
        return len(self.factors[1]) if self.factors else 0


def dropped(delta: Tensor) -> Change:
    """Nothing is kept of the change."""
    norm = _square(delta)
    return Change(norm, norm)


def kept_whole(delta: Tensor) -> Change:
    """Nothing is lost of the change."""
    return Change(_square(delta), 0.0)


def factored(delta: Tensor, rank: int | None, energy: float | None, dtype: str) -> Change:
    """The best approximation of a (O, I) change of a rank, or of the least rank that keeps a share of its squared norm, as
    U sqrt(S) and sqrt(S) V^T (Eckart and Young 1936); what rounding to `dtype` loses counts."""
    import torch

    left, values, right = decompose(delta, rank)
    if energy is not None:
        kept = values.square().cumsum(0)
        rank = int((kept < energy * kept[-1]).sum()) + 1
        left, values, right = left[:, :rank], values[:rank], right[:, :rank]
    root = values.sqrt()
    first, second = ((root * each).to(getattr(torch, dtype)) for each in (right, left))
    first = first.T.contiguous()
    lost = delta.double() - second.double() @ first.double()
    return Change(_square(delta), _square(lost), (second, first))


def refactored(left: Tensor, right: Tensor, rank: int | None, dtype: str) -> Change:
    """The same of a change that is a product of (O, k) and (k, I) float64 factors, which is never multiplied out."""
    import torch

    outer, inner = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(outer.R @ inner.R.T, full_matrices=False)
    rank = len(values) if rank is None else min(rank, len(values))
    root = values[:rank].sqrt()
    second = ((outer.Q @ u[:, :rank]) * root).to(getattr(torch, dtype))
    first = ((root[:, None] * v[:rank]) @ inner.Q.T).to(getattr(torch, dtype))
    # |L R - B A|^2 through Gram matrices of the factors: [L, -B] times [R; A]
    lefts, rights = torch.cat([left, -second.double()], dim=1), torch.cat([right, first.double()])
    lost = float(((lefts.T @ lefts) * (rights @ rights.T)).sum())
    return Change(float(values.square().sum()), max(lost, 0.0), (second, first))


def relative(changes: Iterable[Change]) -> float:
    """|what is lost| / |change| of all of them together; 0 where nothing changed."""
    every = list(changes)
    norm = math.fsum(change.norm for change in every)
    return math.sqrt(math.fsum(change.lost for change in every) / norm) if norm else 0.0


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())
