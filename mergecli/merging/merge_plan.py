"""The plan of a merge: what is read and written, and time and memory from a rehearsal on a few tensors."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from mergecli import methods
from mergecli.merging.learning.files import Learned, Learning
from mergecli.merging.models import BLOCK, Models, Result
from mergecli.methods._base import Group, Unit
from mergecli.results.card import card_path
from mergecli.results.plan import Plan, Work
from mergecli.runtime import interrupts
from mergecli.runtime.memory import peak_memory
from mergecli.storage.checkpoint import Checkpoint

ENOUGH = 1 << 24
"""Entries of a rehearsal: with so many a survey asks for the passes that it would ask for with all."""
SMALL = 1 << 17
"""Entries of models that are rehearsed whole."""
LONG_ENOUGH = 3.0
"""Seconds of rehearsal after which no other shapes are tried."""
WRITES = 500e6
"""Bytes that a disk is taken to write in a second: a dry run writes nothing, and cannot measure it."""

Rehearse = Callable[[Models, bool], None]
"""Computes all that the merge would, or only the surveys before it, on models that have only some of the tensors."""


def merge_plan(
    models: Models, merges: Sequence[tuple[Learned, Learning]], shard_size: int | None, rehearse: Rehearse
) -> Plan:
    """The plan of merges of the same models.

    Args:
        merges: what each is expected to have learned, and the learning, which several may share.
    """

    smallest = min(models.shapes, key=lambda name: prod(models.shapes[name]))
    _one(_of_tensors(models, [smallest]), rehearse)  # what is loaded the first time, as the merge does
    began = time.perf_counter()
    recipe = merges[0][0].target.recipe
    found = _rehearsed(models, max(each.target.method.unit for each, _ in merges), rehearse)
    learned = [each.plan() for each in {id(learning): learning for _, learning in merges}.values()]
    work: list[Work] = []
    for name, stored in models.read.items():
        source = str(recipe.base if stored is models.base else recipe.tuned[name])
        tensors, size = len(stored.entries), stored.nbytes
        work.append(Work("read", name, source, tensors=tensors, passes=found.passes, bytes=size))
    work += [row for each in learned for row in each.work]
    names = dict.fromkeys(methods.name_of(each.target.method) for each, _ in merges)
    space = "" if models.dense is models else f" in {recipe.space} space"
    work.append(Work("merge", ", ".join(names) + space, passes=found.passes, seconds=found.seconds))
    for each, learning in merges:
        target = each.target
        inputs = [*models.read, *learning.inputs]
        size = target.writer(target.path, models, shard_size, inputs, each.about).size
        name, tensors = methods.name_of(target.method), len(target.layout(models))
        work.append(Work("write", name, str(target.path), tensors=tensors, bytes=size, seconds=size / WRITES))
        if target.has_card:
            work.append(Work("write", f"card of {name}", str(card_path(target.path))))
    memory = peak_memory() + max(each.memory for each in learned)
    return Plan("merge", tuple(work), memory, time.perf_counter() - began)


@dataclass(frozen=True)
class _Rehearsal:
    passes: int
    """Over the models, the last one that merges too; those that look at samples do not count."""
    seconds: float
    """That all tensors would take."""


def _rehearsed(models: Models, unit: Unit, rehearse: Rehearse) -> _Rehearsal:
    """Merges some of the tensors, and computes from their time that of all."""
    shapes = models.shapes
    if unit is not Unit.TENSOR or models.size <= SMALL:
        chosen = _some_of_each_shape(shapes)
        passes, seconds = _one(_of_tensors(models, chosen), rehearse)
        entries = sum(prod(shapes[name]) for name in chosen)
        return _Rehearsal(passes, seconds * models.size / max(1, entries))
    counts = Counter(shapes.values())
    together = os.cpu_count() or 1
    passes, _ = _one(_of_tensors(models, _some_of_each_shape(shapes)), rehearse, merges=False)
    seconds, spent, done, left = 0.0, 0.0, 0.0, 0.0
    for shape in sorted(counts, key=lambda each: (-prod(each), each)):
        cost = counts[shape] * prod(shape) * (min(shape) if len(shape) > 1 else 1)
        if spent > LONG_ENOUGH:
            left += cost
            continue
        names = [name for name, each in shapes.items() if each == shape][:together]
        _, took = _one(_of_tensors(models, names), rehearse)
        spent += took
        seconds += took * counts[shape] / len(names)
        done += cost
    return _Rehearsal(passes + 1, seconds * (1 + left / max(done, 1.0)))


def _some_of_each_shape(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of tensors with about `ENOUGH` entries together: one of each shape, the largest first, then a second of each."""
    seen: Counter[tuple[int, ...]] = Counter()
    turns: list[tuple[int, int, str]] = []
    for name, shape in shapes.items():
        turns.append((seen[shape], -prod(shape), name))
        seen[shape] += 1
    chosen: list[str] = []
    entries = 0
    for _, size, name in sorted(turns):
        chosen.append(name)
        entries -= size
        if entries >= ENOUGH:
            break
    return chosen


@dataclass(frozen=True)
class _CountedModels(Models):
    """Models that remember how often they were read from beginning to end."""

    whole: list[str] = field(default_factory=list[str])

    def map(
        self,
        work: Callable[[int, Group], Result],
        sample: int = 1,
        *,
        unit: Unit = Unit.ENTRY,
        fused: bool = False,
    ) -> Iterator[Result]:
        if sample == 1:
            self.whole.append("read")
        return super().map(work, sample, unit=unit, fused=fused)


def _one(sample: _CountedModels, rehearse: Rehearse, *, merges: bool = True) -> tuple[int, float]:
    """How many passes there are, and how long they take; what the disk adds to the first counts once."""
    cold = _read_seconds(sample)
    warm = _read_seconds(sample)
    began = time.perf_counter()
    rehearse(sample, merges)
    return len(sample.whole), time.perf_counter() - began + max(cold - warm, 0.0)


def _read_seconds(sample: Models) -> float:
    began = time.perf_counter()
    for each in sample.read.values():
        for name in sample.floats:
            interrupts.check()
            size = each.entries[name].size
            for start in range(0, size, BLOCK):
                each.read_entries(name, start, min(start + BLOCK, size))
    return time.perf_counter() - began


def _of_tensors(models: Models, names: Sequence[str]) -> _CountedModels:
    """The models with these of their tensors only."""

    def some(stored: Checkpoint) -> Checkpoint:
        entries = {name: stored.entries[name] for name in sorted(names) if name in stored.entries}
        return replace(stored, entries=entries, hashes=stored.hashes.anew())

    base = some(models.base) if models.base else None
    tuned = {name: some(each) for name, each in models.tuned.items()}
    return _CountedModels(base, tuned, models.seed, models.device, models.uses_base)
