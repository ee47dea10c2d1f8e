"""The exact k-th largest value of every task's entries, found in streaming passes.

To sort all entries, all task vectors would have to be in memory. Instead, a bracket is put around each value that is
sought, and a pass counts what lies above it and keeps what lies inside. Of values that equal an end of the bracket only
the number is kept: the entries of half-precision models are so coarse that a fifth of them may be equal. Where many others
are equal, as in quantized task vectors, each is kept once, with how often it occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from mergecli.methods._base import Group, Groups

if TYPE_CHECKING:
    from numpy import float32, int32
    from numpy.typing import NDArray
    from torch import Tensor

SAMPLE = 128
"""One entry in so many is looked at to bracket the threshold."""
MARGIN = 0.004
"""Half the width of the bracket, as a fraction of all entries: what falls inside is kept in memory."""
BITS = 15
"""The last bits of a magnitude, which all magnitudes of a bin may have: the bins' bounds are 1/256 apart."""


@dataclass(frozen=True)
class Rank:
    """Which of the largest values is wanted."""

    density: float
    """About which share of all entries is as large or larger."""
    kept: Callable[[int], int]
    """Of n entries, the k-th largest; 0 for infinity."""


class Bracket(NamedTuple):
    """The values from `low` to `high`, both included."""

    low: float
    high: float


def magnitude_thresholds(
    groups: Groups, density: float, *, each_tensor: bool = False, one_more: bool = False
) -> dict[str, Tensor]:
    """Name -> (T,) smallest magnitude that belongs to the largest `density` of each task vector's entries.

    With `each_tensor` the entries of each tensor are ranked by themselves and the names are theirs; otherwise the
    whole task vectors are ranked and the only name is "". k = int(density * entries) entries are kept (`one_more`:
    k + 1), and all that tie with the last of them; infinity where k is 0.
    """
    rank = Rank(density, lambda entries: min(entries, int(entries * density) + one_more))
    if each_tensor:
        return kth_largest_by_tensor(groups, [rank.kept])[0]
    return {"": kth_largest(groups, [rank], _magnitudes)[0]}


def kth_largest(groups: Groups, ranks: Sequence[Rank], values: Callable[[Group], Tensor]) -> list[Tensor]:
    """(T,) k-th largest value of each task's entries over the whole model, for each of the ranks, in one pass.

    Args:
        values: a group's (T, ...) values, or (1, ...) where all tasks share them; may overwrite the group.

    The brackets come from a small sample, and hold under a hundredth of all entries between their ends. The counts show
    whether one missed; then wider ones are tried.
    """
    import torch

    margin = MARGIN
    while True:
        brackets = _sampled_brackets(groups, ranks, values, margin)
        found: list[list[float | None]] = []
        for _, entries, counted in _counted(groups, {"": brackets}, values):
            found = [
                [near.largest(min(entries, rank.kept(entries))) for near in tasks]
                for rank, tasks in zip(ranks, counted, strict=True)
            ]
        if all(each is not None for tasks in found for each in tasks):
            return [torch.tensor(tasks) for tasks in found]
        margin *= 8  # three times are enough for a bracket of all entries


def kth_largest_by_tensor(groups: Groups, kept: Sequence[Callable[[int], int]]) -> list[dict[str, Tensor]]:
    """Name -> (T,) k-th largest magnitude of each task's entries of a tensor, for each of the k, in two passes.

    Args:
        kept: of n entries, the k-th largest; 0 for infinity.

    A sample of a tensor is too small to rely on: the brackets come from counts of all its magnitudes by their leading
    bits, which cannot miss.
    """
    import torch

    brackets = {
        name: [[_bin_of(each, k(int(each.sum()))) for each in bins] for k in kept]
        for name, bins in _binned(groups)
    }
    found: list[dict[str, Tensor]] = [{} for _ in kept]
    for name, entries, counted in _counted(groups, brackets, _magnitudes):
        for thresholds, k, tasks in zip(found, kept, counted, strict=True):
            thresholds[name] = torch.tensor([near.largest(k(entries)) for near in tasks])
    return found


def _magnitudes(group: Group) -> Tensor:
    return group.deltas.abs_()


def _sampled_brackets(
    groups: Groups, ranks: Sequence[Rank], values: Callable[[Group], Tensor], margin: float
) -> list[list[Bracket]]:
    """For each rank and task, from a value a little below the one sought to one a little above it, from a sample."""
    import numpy as np

    sample: list[Tally] = []  # of each task, entries / SAMPLE values
    for parts in groups.map(lambda group: [*map(packed, _rows(values(group)).cpu().numpy())], SAMPLE):
        sample = sample or [Tally() for _ in parts]
        for tally, part in zip(sample, parts, strict=True):
            tally.add(part)
    size = sample[0].size
    slack = margin + 2 / max(size, 1)  # two entries more, for samples so small that the margin is none
    indices = [
        size - 1 - int(share * size)
        for rank in ranks
        for share in (rank.density + slack, rank.density - slack)
    ]
    known = sorted({index for index in indices if 0 <= index < size})
    found: list[list[Bracket]] = []  # of each task
    for tally in sample:
        every = tally.values()
        every.partition(known)
        ends = [float(every[i]) if 0 <= i < size else -np.inf if i < 0 else np.inf for i in indices]
        found.append([Bracket(*pair) for pair in zip(ends[::2], ends[1::2], strict=True)])
    return [[task[number] for task in found] for number in range(len(ranks))]


def _rows(values: Tensor) -> Tensor:
    """(T, n) the entries of (T, ...) values."""
    return values.reshape(len(values), -1)


def _binned(groups: Groups) -> Iterator[tuple[str, NDArray[int32]]]:
    """For each tensor: (T, bins) how many magnitudes have the same leading bits, the smallest magnitudes first."""
    import numpy as np

    bins = 1 << (31 - BITS)

    def look(group: Group) -> tuple[str, NDArray[int32]]:
        rows = _magnitudes(group).reshape(group.tasks, -1).cpu().numpy().view(np.int32)
        rows >>= BITS  # the bits of floats that are not negative order as the floats do
        return group.name, np.stack([np.bincount(row, minlength=bins) for row in rows]).astype(np.int32)

    for name, parts in groupby(groups.map(look), key=lambda part: part[0]):
        yield name, reduce(np.add, (counts for _, counts in parts))


def _bin_of(counts: NDArray[int32], k: int) -> Bracket:
    """The bin with the k-th largest magnitude, of (bins,) counts."""
    import numpy as np

    if k == 0:
        return Bracket(np.inf, np.inf)
    number = len(counts) - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), k))
    ends = np.array([number << BITS, (number + 1 << BITS) - 1], dtype=np.int32).view(np.float32)
    return Bracket(*ends.tolist())


class Packed(NamedTuple):
    """Float32 values as bytes, and int32 how often each occurs; the latter empty where every one stands by itself."""

    values: bytes
    counts: bytes = b""


def packed(values: NDArray[float32]) -> Packed:
    """(n,) values in as few bytes as they take."""
    import numpy as np

    ordered = np.sort(values)
    last = np.flatnonzero(ordered[1:] != ordered[:-1])
    if not 0 < 2 * (len(last) + 1) < len(values):
        return Packed(values.tobytes())
    last = np.append(last, len(values) - 1)
    return Packed(ordered[last].tobytes(), np.diff(last, prepend=-1).astype(np.int32).tobytes())


@dataclass
class Tally:
    """Many values, added a few at a time.

    Many small arrays in place of three long ones would keep the allocator from using again the memory that lies between them.
    """

    alone: bytearray = field(default_factory=bytearray)
    distinct: bytearray = field(default_factory=bytearray)
    counts: bytearray = field(default_factory=bytearray)
    size: int = 0
    """How many values there are."""

    def add(self, some: Packed) -> None:
        import numpy as np

        if some.counts:
            self.distinct += some.values
            self.counts += some.counts
            self.size += int(np.frombuffer(some.counts, np.int32).sum())
        else:
            self.alone += some.values
            self.size += len(some.values) // 4

    def values(self) -> NDArray[float32]:
        """(size,) all of them; may be put in another order."""
        import numpy as np

        alone = np.frombuffer(self.alone, np.float32)
        if not self.counts:
            return alone
        several = np.repeat(np.frombuffer(self.distinct, np.float32), np.frombuffer(self.counts, np.int32))
        return np.concatenate([alone, several]) if len(alone) else several


@dataclass
class Near:
    """What is known of a task's values about a bracket."""

    bracket: Bracket
    above: int = 0
    at_high: int = 0
    at_low: int = 0
    """0 where the bracket is one value."""
    between: Tally = field(default_factory=Tally)
    """The values between its ends."""

    def add(self, above: int, at_high: int, at_low: int, between: Packed) -> None:
        self.above += above
        self.at_high += at_high
        self.at_low += at_low
        self.between.add(between)

    def largest(self, k: int) -> float | None:
        """The k-th largest value, None if it does not lie in the bracket; infinity where k is 0."""
        import numpy as np

        between = self.between.size
        below_high = k - self.above - self.at_high
        if k == 0:
            return np.inf
        if below_high <= 0:
            return self.bracket.high if k > self.above else None
        if below_high <= between:
            values, place = self.between.values(), between - below_high
            values.partition(place)
            return float(values[place])
        return self.bracket.low if below_high <= between + self.at_low else None


def _counted(
    groups: Groups, brackets: Mapping[str, list[list[Bracket]]], values: Callable[[Group], Tensor]
) -> Iterator[tuple[str, int, list[list[Near]]]]:
    """For each tensor that has brackets of its own, or "" for the whole model: its number of entries, and what lies
    about the bracket of each rank and task."""

    def look(group: Group) -> tuple[str, int, list[list[tuple[int, int, int, Packed]]]]:
        rows = _rows(values(group))
        name = group.name if group.name in brackets else ""
        return (
            name,
            rows.shape[1],
            [[_near(*pair) for pair in zip(rows, tasks, strict=True)] for tasks in brackets[name]],
        )

    for name, parts in groupby(groups.map(look), key=lambda part: part[0]):
        result = [[Near(bracket) for bracket in tasks] for tasks in brackets[name]]
        entries = 0
        for _, count, counted in parts:
            entries += count
            for tasks, found in zip(result, counted, strict=True):
                for near, more in zip(tasks, found, strict=True):
                    near.add(*more)
        yield name, entries, result


def _near(row: Tensor, bracket: Bracket) -> tuple[int, int, int, Packed]:
    """How many (n,) values lie above a bracket, equal its high end and its low end, and those between.

    By NumPy, whose comparisons and counts of booleans are several times as fast as torch's on a CPU.
    """
    import numpy as np

    low, high = map(np.float32, bracket)
    values: NDArray[float32] = row.cpu().numpy()
    not_below = values >= low
    over = values > high
    near = values[np.flatnonzero(not_below ^ over)]
    at_high = near == high
    at_low = (near == low) & ~at_high
    between = near[~(at_high | at_low)]
    above, high_ones, low_ones = (int(np.count_nonzero(each)) for each in (over, at_high, at_low))
    return above, high_ones, low_ones, packed(between)


def keep_largest(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """(T, ...) the deltas with every entry whose magnitude is below its task's threshold set to 0, in place."""
    import torch

    # `hardshrink` drops magnitudes up to its limit, in place and in one pass; the threshold itself must stay.
    below = torch.nextafter(thresholds, torch.full_like(thresholds, -1.0)).tolist()
    for row, largest_dropped in zip(deltas, below, strict=True):
        torch.ops.aten.hardshrink.out(row, largest_dropped, out=row)
    return deltas
