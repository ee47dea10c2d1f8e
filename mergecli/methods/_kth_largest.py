"""The exact k-th largest value of every task's entries, found in streaming passes.

To sort all entries, all task vectors would have to be in memory. Instead, a bracket is put around each value that is
sought, and a pass counts what lies above it and keeps what lies inside. Of values that equal an end of the bracket only
the number is kept: the entries of half-precision models are so coarse that a fifth of them may be equal. Where many others
are equal, as in quantized task vectors, each is kept once, with how often it occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from mergecli.methods._base import Group, Groups

if TYPE_CHECKING:
    from numpy import float32, intp
    from numpy.typing import NDArray
    from torch import Tensor

SAMPLE = 128
"""One entry in so many is looked at to bracket the threshold of a whole model."""
MARGIN = 0.004
"""Half the width of that bracket, as a fraction of all entries: what falls inside is kept in memory."""
THIN = 31
"""The same of a single tensor; no divisor of a row's length, so that all columns are met."""
PROBE = 256
"""So many values show whether most of them are equal to others."""
DEVIATIONS = 5
"""Half the width of a tensor's bracket, in standard deviations of the share of a random sample that is larger."""


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

    The first pass brackets each from a part of the tensor's entries, and the second counts. Where a bracket missed, which
    about one model in a thousand has, a third pass counts all that lies on the right side of it.
    """
    import torch

    found: list[dict[str, Tensor]] = [{} for _ in kept]
    brackets = dict(_thinned_brackets(groups, kept))
    while brackets:
        missed: dict[str, list[list[Bracket]]] = {}
        for name, entries, counted in _counted(groups, brackets, _magnitudes):
            known = [
                [near.sure(k(entries)) for near in tasks] for k, tasks in zip(kept, counted, strict=True)
            ]
            if any(each.low != each.high for tasks in known for each in tasks):
                missed[name] = known
            else:
                for thresholds, tasks in zip(found, known, strict=True):
                    thresholds[name] = torch.tensor([each.low for each in tasks])
        brackets = missed
    return found


def _magnitudes(group: Group) -> Tensor:
    return group.deltas.abs_()


def _sampled_brackets(
    groups: Groups, ranks: Sequence[Rank], values: Callable[[Group], Tensor], margin: float
) -> list[list[Bracket]]:
    """For each rank and task, from a value a little below the one sought to one a little above it, from a sample."""
    sample: list[Tally] = []
    for parts in groups.map(lambda group: _packed_rows(values(group)), SAMPLE):
        sample = _added(sample, parts)
    return _brackets(sample, [(rank.density, margin) for rank in ranks])


def _thinned_brackets(
    groups: Groups, kept: Sequence[Callable[[int], int]]
) -> Iterator[tuple[str, list[list[Bracket]]]]:
    """For each tensor: the brackets of each k and task, from some of its entries."""

    def look(group: Group) -> tuple[str, int, list[Packed]]:
        return group.name, group.shape.numel(), _packed_rows(_magnitudes(group.every(THIN)))

    for name, parts in groupby(groups.map(look), key=lambda part: part[0]):
        sample, entries = list[Tally](), 0
        for _, size, packed_rows in parts:
            sample, entries = _added(sample, packed_rows), entries + size
        shares = [k(entries) / max(entries, 1) for k in kept]
        deviation = DEVIATIONS / max(sample[0].size, 1) ** 0.5
        yield name, _brackets(sample, [(share, deviation * (share * (1 - share)) ** 0.5) for share in shares])


def _packed_rows(values: Tensor) -> list[Packed]:
    return [packed(row) for row in _rows(values).cpu().numpy()]


def _added(sample: list[Tally], parts: Sequence[Packed]) -> list[Tally]:
    """The sample of each task with its part; a new one where it is empty."""
    sample = sample or [Tally() for _ in parts]
    for tally, part in zip(sample, parts, strict=True):
        tally.add(part)
    return sample


def _brackets(sample: Sequence[Tally], wanted: Sequence[tuple[float, float]]) -> list[list[Bracket]]:
    """For each (share, margin) and each task's sample: the values of which the share plus the margin and the share less the
    margin are as large or larger."""
    import numpy as np

    size = sample[0].size
    indices = [
        size - 1 - int(end * size)
        for share, margin in wanted
        # two entries more, for samples so small that the margin is none
        for end in (share + margin + 2 / max(size, 1), share - margin - 2 / max(size, 1))
    ]
    known = sorted({index for index in indices if 0 <= index < size})
    found: list[list[Bracket]] = []  # of each task
    for tally in sample:
        every = tally.values()
        if known:
            every.partition(known)
        ends = [float(every[i]) if 0 <= i < size else -np.inf if i < 0 else np.inf for i in indices]
        found.append([Bracket(*pair) for pair in zip(ends[::2], ends[1::2], strict=True)])
    return [[task[number] for task in found] for number in range(len(wanted))]


def _rows(values: Tensor) -> Tensor:
    """(T, n) the entries of (T, ...) values."""
    return values.reshape(len(values), -1)


class Packed(NamedTuple):
    """Float32 values as bytes, and int32 how often each occurs; the latter empty where every one stands by itself."""

    values: bytes
    counts: bytes = b""


def packed(values: NDArray[float32]) -> Packed:
    """(n,) values, each once with how often it occurs where that takes fewer bytes.

    The first few tell whether it does: to sort all values of float32 models would take a twentieth of a merge.
    """
    import numpy as np

    few = values[:PROBE]
    if 2 * len(_ends_of_runs(np.sort(few))) >= len(few):
        return Packed(values.tobytes())
    ordered = np.sort(values)
    last = _ends_of_runs(ordered)
    if 2 * len(last) >= len(values):
        return Packed(values.tobytes())
    return Packed(ordered[last].tobytes(), np.diff(last, prepend=-1).astype(np.int32).tobytes())


def _ends_of_runs(ordered: NDArray[float32]) -> NDArray[intp]:
    """(d,) where the last of each run of equal values stands."""
    import numpy as np

    return np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))


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

    def sure(self, k: int) -> Bracket:
        """Where the k-th largest value lies: at one value, or on one side of the bracket that missed it."""
        import numpy as np

        if (value := self.largest(k)) is not None:
            return Bracket(value, value)
        return Bracket(self.bracket.high, np.inf) if k <= self.above else Bracket(-np.inf, self.bracket.low)


def _counted(
    groups: Groups, brackets: Mapping[str, list[list[Bracket]]], values: Callable[[Group], Tensor]
) -> Iterator[tuple[str, int, list[list[Near]]]]:
    """For each tensor that has brackets of its own, or "" for the whole model: its number of entries, and what lies
    about the bracket of each rank and task. Tensors without any are passed over."""
    whole = "" in brackets

    def look(group: Group) -> tuple[str, int, list[list[tuple[int, int, int, Packed]]]] | None:
        name = "" if whole else group.name
        if name not in brackets:
            return None
        rows = _rows(values(group))
        return (
            name,
            rows.shape[1],
            [[_near(*pair) for pair in zip(rows, tasks, strict=True)] for tasks in brackets[name]],
        )

    for name, parts in groupby(filter(None, groups.map(look)), key=lambda part: part[0]):
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


def largest_of(values: Tensor, count: int) -> Tensor:
    """(...) the `count` entries of largest magnitude, at least one, and all that tie with the last of them; 0 elsewhere."""
    count = max(1, count)
    if count >= values.numel():
        return values
    sizes = values.abs()
    threshold = sizes.flatten().kthvalue(sizes.numel() - count + 1).values
    return values.masked_fill(sizes < threshold, 0)


def keep_largest(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """(T, ...) the deltas with every entry whose magnitude is below its task's threshold set to 0, in place."""
    import torch

    # `hardshrink` drops magnitudes up to its limit, in place and in one pass; the threshold itself must stay.
    below = torch.nextafter(thresholds, torch.full_like(thresholds, -1.0)).tolist()
    for row, largest_dropped in zip(deltas, below, strict=True):
        torch.ops.aten.hardshrink.out(row, largest_dropped, out=row)
    return deltas
