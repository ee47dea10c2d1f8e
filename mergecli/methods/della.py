"""DELLA: drop entries at random, small ones more often, then elect a sign and fuse what agrees with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from mergecli.methods._base import Group, PerTensor, Unit, total
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Della(PerTensor):
    """theta = theta_0 + lambda tau,  with

    drop   t_i = tau_i / (1 - p) with probability 1 - p, else 0;  p = drop_rate - window / 2 + window r / n,
           r the entry's rank by magnitude among the n of its row, from 0 for the largest to n - 1
    elect  s = sign(sum_i t_i)
    fuse   tau = mean or sum of the t_i that are not 0 and whose sign is s

    A row is what belongs to one index of the first dimension; a vector is one row. Entries of equal magnitude are
    ranked in their order. This is the paper's MagPrune. The authors' program and mergekit take r / (n - 1). mergekit's
    `epsilon` is half a window; it ranks convolutions along the second dimension alone, and scales each tensor back to
    its L1 norm in place of dividing by 1 - p.
    """

    title: ClassVar[str] = (
        "entries dropped at random, small ones more often, a sign elected, the agreeing ones fused"
    )
    paper: ClassVar[str] = "Deep et al., DELLA-Merging, 2024, arXiv 2406.11617, section 3"
    also_called: ClassVar[Mapping[str, str]] = {"della_linear": "elect=false", "magprune": "elect=false"}
    elementwise: ClassVar[bool] = False

    scaling_factor: Annotated[float, Range()] = 1.0
    """lambda; 0 gives the base back."""
    drop_rate: Annotated[float, Range(0, 1, open_high=True)] = 0.3
    """The mean probability that an entry is dropped, less half a window / n; 0, with a window of 0, drops none."""
    window: Annotated[float, Range(0, 1)] = 0.14
    """How much more likely the smallest entry of a row is dropped than the largest; 0 makes it DARE's drop. Half of it
    may be added to and taken from the drop rate without leaving [0, 1)."""
    aggregate: Literal["mean", "sum"] = "mean"
    """How agreeing entries are fused: their mean, as in the paper, or their sum."""
    elect: bool = True
    """Whether a sign is elected; otherwise all entries that were not dropped are fused."""

    @property
    def unit(self) -> Unit:
        return Unit.ROW

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        del tasks
        rate, half = settings.get("drop_rate", cls.drop_rate), settings.get("window", cls.window) / 2
        if rate - half < 0 or rate + half >= 1:
            return [("window", f"half of it, {half:g}, around `drop_rate` {rate:g} leaves the range [0, 1)")]
        return []

    def merge(self, group: Group, /) -> Tensor:
        import torch

        deltas = group.deltas
        for task, row in enumerate(deltas):
            if row.numel() and (self.drop_rate or self.window):
                drop = self._probabilities(row)
                row.div_(1 - drop).masked_fill_(group.uniform(task) < drop, 0)
        if self.elect:
            sign = total(deltas).sign_()
            for row in deltas:
                row.masked_fill_(row * sign <= 0, 0)
        merged = total(deltas)
        if self.aggregate == "mean":
            count = torch.zeros_like(merged)  # `sum` would make whole numbers of all tasks' booleans at once
            for row in deltas:
                count += row != 0
            merged /= count.clamp_(min=1)
        return merged.mul_(self.scaling_factor).add_(group.base)

    def _probabilities(self, delta: Tensor) -> Tensor:
        """(...) the probability that each entry is dropped.

        Magnitude and place make one whole number, since numbers are sorted many times as fast as places by magnitude;
        and it makes the order of equal magnitudes certain.
        """
        import numpy as np
        import torch

        rows = delta.abs().reshape(len(delta) if delta.dim() > 1 else 1, -1)
        count = rows.shape[1]
        keys = rows.cpu().view(torch.int32).numpy().astype(np.int64)  # orders as the magnitudes do
        np.left_shift(np.subtract(np.iinfo(np.int32).max, keys, out=keys), 32, out=keys)
        keys |= np.arange(count)
        keys.sort(axis=1)
        order = torch.from_numpy(np.bitwise_and(keys, 0xFFFFFFFF, out=keys)).to(rows.device)
        low = self.drop_rate - self.window / 2
        steps = torch.arange(count, dtype=rows.dtype, device=rows.device).mul_(self.window / count).add_(low)
        return torch.empty_like(rows).scatter_(1, order, steps.expand_as(rows)).view(delta.shape)
