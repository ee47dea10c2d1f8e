"""The exact k-th largest magnitude of every task vector, found in one streaming pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mergecli.methods._kinds import Group, Groups

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 64
"""One entry in so many is looked at to bracket the threshold."""
MARGIN = 0.004
"""Half the width of the bracket, as a fraction of all entries: what falls inside is kept in memory."""


def magnitude_thresholds(
    groups: Groups, density: float, *, each_tensor: bool = False, one_more: bool = False
) -> dict[str, Tensor]:
    """Name -> (T,) smallest magnitude that belongs to the largest `density` of each task vector's entries.

    With `each_tensor` the entries of each tensor are ranked by themselves and the names are theirs; otherwise the
    whole task vectors are ranked and the only name is "". k = int(density * entries) entries are kept (`one_more`:
    k + 1), and all that tie with the last of them; infinity where k is 0.

    Why this way: a small sample brackets the k-th magnitude; one pass over all models counts what lies above the
    bracket and keeps what falls inside, under a hundredth of the entries; the exact one is selected among those. If
    the bracket missed, which the counts show, a wider one is tried.
    """
    if each_tensor:
        return _each_tensor(groups, density, one_more)
    import torch

    counts = _sampled_quantiles(groups, density, MARGIN)
    margin = MARGIN
    while True:
        low, high = counts
        above, inside, entries = _count(groups, low, high)
        keep = _kept(entries, density, one_more)
        if keep == 0:
            return {"": torch.full_like(low, torch.inf)}
        found = [
            _kth_largest(torch.cat(values), keep - more)
            for values, more in zip(inside, above, strict=True)
            if more < keep <= more + sum(map(len, values))
        ]
        if len(found) == len(low):
            return {"": torch.tensor(found)}
        margin *= 8
        counts = _sampled_quantiles(groups, density, margin)


def _kept(entries: int, density: float, one_more: bool) -> int:
    return min(entries, int(entries * density) + one_more)


def _kth_largest(values: Tensor, k: int) -> float:
    return float(values.kthvalue(len(values) - k + 1).values)


def _sampled_quantiles(groups: Groups, density: float, margin: float) -> tuple[Tensor, Tensor]:
    """(T,) and (T,): magnitudes a little below and a little above each task vector's threshold, from a sample."""
    import torch

    pieces = list(groups.map(lambda group: group.deltas.abs().reshape(group.tasks, -1), SAMPLE))
    sample = torch.cat(pieces, dim=1).sort(dim=1, descending=True).values  # (T, entries / SAMPLE)
    size = sample.shape[1]

    def at(rank: float, outside: float) -> Tensor:
        place = int(rank * size)
        return sample[:, place].clone() if 0 <= place < size else torch.full((len(sample),), outside)

    slack = 2 / max(size, 1)
    return at(density + margin + slack, 0.0), at(density - margin - slack, torch.inf)


def _count(groups: Groups, low: Tensor, high: Tensor) -> tuple[list[int], list[list[Tensor]], int]:
    """For each task: how many magnitudes lie above `high`, and those in [low, high]; and the number of entries."""

    def look(group: Group) -> tuple[int, list[tuple[int, Tensor]]]:
        deltas = group.deltas.abs_().reshape(group.tasks, -1)
        counted = [_above_and_inside(*each) for each in zip(deltas, low.tolist(), high.tolist(), strict=True)]
        return group.shape.numel(), counted

    above = [0] * len(low)
    inside: list[list[Tensor]] = [[] for _ in low]
    entries = 0
    for count, tasks in groups.map(look):
        entries += count
        for task, (more, values) in enumerate(tasks):
            above[task] += more
            inside[task].append(values)
    return above, inside, entries


def _above_and_inside(magnitudes: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many (n,) magnitudes lie above `high`, and those in [low, high].

    By NumPy, whose comparisons and counts of booleans are several times as fast as torch's on a CPU.
    """
    import numpy as np
    import torch

    values = magnitudes.cpu().numpy()
    not_below = values >= np.float32(low)
    over = values > np.float32(high)
    more = int(np.count_nonzero(over))
    return more, torch.from_numpy(values[np.flatnonzero(not_below ^ over)])


def keep_largest(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """(T, ...) the deltas with every entry whose magnitude is below its task's threshold set to 0, in place."""
    import torch

    below = torch.nextafter(thresholds, torch.full_like(thresholds, -1.0)).tolist()
    for row, largest_dropped in zip(deltas, below, strict=True):
        torch.ops.aten.hardshrink.out(row, largest_dropped, out=row)
    return deltas


def _each_tensor(groups: Groups, density: float, one_more: bool) -> dict[str, Tensor]:
    import torch

    thresholds: dict[str, Tensor] = {}
    name = ""
    parts: list[Tensor] = []

    def finish(rank: Callable[[Tensor, int], float] = _kth_largest) -> None:
        rows = torch.cat(parts, dim=1)
        keep = _kept(rows.shape[1], density, one_more)
        thresholds[name] = torch.tensor([rank(row, keep) if keep else torch.inf for row in rows])

    def look(group: Group) -> tuple[str, Tensor]:
        return group.name, group.deltas.abs().reshape(group.tasks, -1)

    for tensor, magnitudes in groups.map(look):
        if tensor != name and parts:
            finish()
            parts = []
        name = tensor
        parts.append(magnitudes)
    if parts:
        finish()
    return thresholds
