"""The exact k-th largest magnitude of every task vector, found in one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergecli.methods._base import Group, Groups

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 128
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
    """
    if each_tensor:
        return _each_tensor(groups, density, one_more)
    rank = Rank(density, lambda entries: _kept(entries, density, one_more))
    return {"": kth_largest(groups, [rank], lambda group: group.deltas.abs_())[0]}


@dataclass(frozen=True)
class Rank:
    """Which of the largest values is wanted."""

    density: float
    """About which share of all entries is as large or larger."""
    kept: Callable[[int], int]
    """Of n entries, the k-th largest; 0 for infinity."""


def kth_largest(groups: Groups, ranks: Sequence[Rank], values: Callable[[Group], Tensor]) -> list[Tensor]:
    """(T,) k-th largest value of each task's entries over the whole model, for each of the ranks, in one pass.

    Args:
        values: a group's (T, ...) values; may overwrite the group.

    To sort all entries, all task vectors would have to be in memory. Instead, a small sample brackets the k-th value;
    one pass over all models counts the entries above the bracket and keeps those inside, under a hundredth of all; the
    exact k-th value is selected among those. The counts show whether the bracket missed; then a wider one is tried.
    """
    import torch

    margin = MARGIN
    while True:
        brackets = _sampled_quantiles(groups, ranks, values, margin)
        above, inside, entries = _count(groups, brackets, values)
        # Of `keep` wanted entries, `more` lie above the bracket: the (keep - more)-th largest inside is the threshold. A
        # task is left out of `found` where that is not inside.
        found = [
            [
                torch.inf if keep == 0 else _kth_largest(torch.cat(near), keep - more)
                for near, more in zip(inside[index], above[index], strict=True)
                if keep == 0 or more < keep <= more + sum(map(len, near))
            ]
            for index, keep in enumerate(min(entries, rank.kept(entries)) for rank in ranks)
        ]
        if all(len(each) == len(low) for each, (low, _) in zip(found, brackets, strict=True)):
            return [torch.tensor(each) for each in found]
        margin *= 8  # three times are enough for a bracket of all entries


def _kept(entries: int, density: float, one_more: bool) -> int:
    return min(entries, int(entries * density) + one_more)


def _kth_largest(values: Tensor, k: int) -> float:
    return float(values.kthvalue(len(values) - k + 1).values)


def _sampled_quantiles(
    groups: Groups, ranks: Sequence[Rank], values: Callable[[Group], Tensor], margin: float
) -> list[tuple[Tensor, Tensor]]:
    """(T,) and (T,): values a little below and a little above each task's, for each rank, from a sample."""
    import numpy as np
    import torch

    pieces = list(groups.map(lambda group: values(group).reshape(group.tasks, -1).clone(), SAMPLE))
    sample = torch.cat(pieces, dim=1).cpu().numpy()  # (T, entries / SAMPLE)
    size = sample.shape[1]
    slack = margin + 2 / max(size, 1)  # two entries more, for samples so small that the margin is none
    indices = [
        size - 1 - int(share * size)
        for rank in ranks
        for share in (rank.density + slack, rank.density - slack)
    ]
    if known := sorted({index for index in indices if 0 <= index < size}):
        sample.partition(known, axis=1)

    def at(index: int) -> Tensor:
        if 0 <= index < size:
            return torch.from_numpy(sample[:, index].copy())
        return torch.full((len(sample),), -np.inf if index < 0 else np.inf)

    return [(at(low), at(high)) for low, high in zip(indices[::2], indices[1::2], strict=True)]


def _count(
    groups: Groups, brackets: Sequence[tuple[Tensor, Tensor]], values: Callable[[Group], Tensor]
) -> tuple[list[list[int]], list[list[list[Tensor]]], int]:
    """For each rank and task: how many values lie above the bracket, and those inside; and the number of entries."""
    limits = [list(zip(low.tolist(), high.tolist(), strict=True)) for low, high in brackets]

    def look(group: Group) -> tuple[int, list[list[tuple[int, Tensor]]]]:
        rows = values(group).reshape(group.tasks, -1)
        counted = [
            [_above_and_inside(row, *limit) for row, limit in zip(rows, each, strict=True)] for each in limits
        ]
        return rows.shape[1], counted

    above = [[0] * len(each) for each in limits]
    inside: list[list[list[Tensor]]] = [[[] for _ in each] for each in limits]
    entries = 0
    for count, counted in groups.map(look):
        entries += count
        for index, tasks in enumerate(counted):
            for task, (more, near) in enumerate(tasks):
                above[index][task] += more
                inside[index][task].append(near)
    return above, inside, entries


def _above_and_inside(row: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many (n,) values lie above `high`, and those in [low, high].

    By NumPy, whose comparisons and counts of booleans are several times as fast as torch's on a CPU.
    """
    import numpy as np
    import torch

    values = row.cpu().numpy()
    not_below = values >= np.float32(low)
    over = values > np.float32(high)
    more = int(np.count_nonzero(over))
    return more, torch.from_numpy(values[np.flatnonzero(not_below ^ over)])


def keep_largest(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """(T, ...) the deltas with every entry whose magnitude is below its task's threshold set to 0, in place."""
    import torch

    # `hardshrink` drops magnitudes up to its limit, in place and in one pass; the threshold itself must stay.
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
