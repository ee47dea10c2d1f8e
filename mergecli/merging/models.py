"""The models of a merge: open together, known to fit, and read in blocks of float32."""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from mergecli.clip.other_parts import Candidate, warn_of_other_parts
from mergecli.formats.convert import why_foreign
from mergecli.formats.mixture import one_tower
from mergecli.formats.opening import open_source
from mergecli.formats.projection import CompletedCheckpoint, encoders, own_encoder
from mergecli.hub.fetched import expect_all
from mergecli.methods._base import Group, Shelf, Unit
from mergecli.methods._fused import stacks
from mergecli.recipe.schema import Recipe
from mergecli.runtime import interrupts
from mergecli.runtime.distributed import usable_device
from mergecli.runtime.errors import InputError, MergecliError, UsageError, listed, quoted
from mergecli.runtime.progress import Progress
from mergecli.storage.checkpoint import Checkpoint
from mergecli.storage.differences import Form, differences, lead_hint, leave_out_hint, other_architecture
from mergecli.storage.scratch import Scratch, TensorShelf

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 18
"""Entries of one tensor that are held of each model at a time, by methods that work entry by entry."""

Result = TypeVar("Result")

_COUNTERS = "num_batches_tracked"
"""Of batch normalization: how many batches it has seen. Models differ in it, and nothing depends on it: it is the base's."""

BUFFERS = 768 << 20
"""Bytes that all threads' buffers may take together; a tensor that needs more is still read, by one thread."""


class _Piece(NamedTuple):
    """What is read at a time: entries `start` to `stop` of one tensor, or of each of several that are stacked."""

    name: str
    tensors: tuple[str, ...]
    start: int
    stop: int

    @property
    def entries(self) -> int:
        """Of one model."""
        return (self.stop - self.start) * len(self.tensors)


@dataclass(frozen=True)
class Models:
    """The open checkpoints of a merge, known to fit together."""

    base: Checkpoint | None
    tuned: Mapping[str, Checkpoint]
    seed: int = 0
    device: str = "cpu"
    uses_base: bool = True
    """Whether the base's weights are read, and not only its names, shapes and dtypes."""

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint whose names, shapes and dtypes the result has."""
        return self.base or next(iter(self.tuned.values()))

    @property
    def dense(self) -> Models:
        """The models as they are, where these are in other coordinates."""
        return self

    @property
    def paths(self) -> dict[str, Path]:
        """Every file that is read, by what it is read for."""
        named = {**({"base": self.base} if self.base else {}), **self.tuned}
        return {
            f"{name}: {file}" if len(each.files) > 1 else name: file
            for name, each in named.items()
            for file in each.files
        }

    @cached_property
    def floats(self) -> list[str]:
        """Names of the tensors that are merged."""
        return [name for name, entry in self.reference.entries.items() if entry.is_float]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of the tensors that are merged. Asked for tensor by tensor."""
        return {name: self.reference.entries[name].shape for name in self.floats}

    @property
    def others(self) -> list[str]:
        """Names of the tensors that are copied, those that are not floating point."""
        return [name for name, entry in self.reference.entries.items() if not entry.is_float]

    @cached_property
    def size(self) -> int:
        """Entries of all merged tensors together. Asked for after every block."""
        return sum(self.reference.entries[name].size for name in self.floats)

    @property
    def read(self) -> dict[str, Checkpoint]:
        """The checkpoints whose weights are read: the base first, if it is one of them."""
        return {**({"base": self.base} if self.base and self.uses_base else {}), **self.tuned}

    def digests(self) -> dict[str, str]:
        """Input -> digest; free for what has been read from beginning to end."""
        return {name: each.digest() for name, each in self.read.items()}

    def map(
        self,
        work: Callable[[int, Group], Result],
        sample: int = 1,
        *,
        unit: Unit = Unit.ENTRY,
        fused: bool = False,
    ) -> Iterator[Result]:
        """`work(first entry, group)` of every block of every merged tensor, in order: of its entries, of whole rows, or of
        the whole tensor. Blocks of entries are flat. `fused`: whole queries, keys and values of a layer come stacked.

        Blocks are read and worked on in several threads. `work` may overwrite the group's tensors, and must return none
        of them: a thread reads its next block into the same memory.
        """
        import torch

        width = len(self.tuned) + 1
        pieces = list(self._fused_pieces() if fused else self._pieces(sample, unit))
        widest = max((each.entries for each in pieces), default=0)
        # As many threads as all buffers have room for, so that memory does not grow with the number of processors.
        workers = max(1, min(os.cpu_count() or 1, BUFFERS // (4 * width * widest + 1)))
        local = (
            threading.local()
        )  # each thread's own buffer: new memory for every block would cost page faults
        are_deltas = tuple(each.is_task_vector for each in self.tuned.values())

        def one(piece: _Piece) -> Result:
            if not hasattr(local, "buffer"):
                # Sums that torch splits among its threads round by how many there are: the bytes of a merge must not
                # depend on the number of processors. Blocks run in parallel anyway.
                torch.set_num_threads(1)
                # Memory of its own, which goes back to the system with the thread. What the allocator got back of this size
                # would make it keep all that is freed later.
                own = mmap.mmap(-1, 4 * max(1, width * widest), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                local.buffer = torch.frombuffer(own, dtype=torch.float32)
            rows = self._read(piece, local.buffer)
            if self.device != "cpu":
                rows = rows.to(self.device)
            if unit is not Unit.ENTRY:
                entry = self.reference.entries[piece.tensors[0]]
                whole = piece.entries == entry.size
                rows = rows.view(width, *entry.shape) if whole else rows.view(width, -1, *entry.shape[1:])
            base = rows[0] if "base" in self.read else None
            names, members = tuple(self.tuned), piece.tensors if len(piece.tensors) > 1 else ()
            group = Group(piece.name, base, rows[1:], are_deltas, names, self.seed, piece.start, members)
            return work(piece.start, group)

        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(workers)
        try:
            # Results come in order, so that writers and sums see them as one thread would. At most two blocks a thread
            # wait: a slow consumer must not let results pile up in memory.
            waiting: deque[Future[Result]] = deque()
            for piece in pieces:
                interrupts.check()
                waiting.append(pool.submit(one, piece))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                interrupts.check()
                yield waiting.popleft().result()
            for each in self.read.values():
                each.expect_unchanged()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def _fused_pieces(self) -> Iterator[_Piece]:
        """Whole tensors, and whole stacks of them."""
        for name, members in stacks(self.shapes):
            tensors = members or (name,)
            yield _Piece(name, tensors, 0, self.reference.entries[tensors[0]].size)

    def _pieces(self, sample: int, unit: Unit) -> Iterator[_Piece]:
        """What is read at a time.

        A sample takes a short run of entries out of each stretch, because single entries would cost a read each; the
        runs lie at varying places of their stretches, so that rows and columns of a matrix are all met.
        """
        for name in self.floats:
            count = self.reference.entries[name].size
            step = _step(self.reference.entries[name].shape, unit) if sample == 1 else 1024 * sample
            for number, start in enumerate(range(0, count, step) if count else [0]):
                stop = min(start + step, count)
                if sample > 1:
                    run = -(-(stop - start) // sample)
                    start += (stop - start - run) * (number * 37 % 101) // 101
                    stop = start + run
                yield _Piece(name, (name,), start, stop)

    def _read(self, piece: _Piece, buffer: Tensor) -> Tensor:
        """(1 + T, entries) float32 entries of the base (left as it is where there is none) and of each model."""
        rows = buffer[: (len(self.tuned) + 1) * piece.entries].view(len(self.tuned) + 1, piece.entries)
        read = self.read
        for (task, each), row in zip(read.items(), rows[-len(read) :], strict=True):
            for name, part in zip(piece.tensors, row.chunk(len(piece.tensors)), strict=True):
                if each.entries[name].dtype == "F32":
                    each.read_entries(name, piece.start, piece.stop, into=part)
                else:
                    part.copy_(each.read_entries(name, piece.start, piece.stop))
                if not math.isfinite(float(part.sum())) and not bool(part.isfinite().all()):
                    bad = "NaN" if bool(part.isnan().any()) else "infinity"
                    raise InputError(
                        f"{each.path}: {task}: `{name}` has {bad}",
                        "its training diverged, or the file is damaged: leave the model out, or take an earlier checkpoint",
                    )
        return rows


def _step(shape: tuple[int, ...], unit: Unit) -> int:
    """How many entries of a tensor are read at a time."""
    if unit is Unit.ENTRY:
        return BLOCK
    row = max(1, math.prod(shape[1:]))
    if unit is Unit.TENSOR or len(shape) < 2:
        return max(1, math.prod(shape))
    # Blocks that end where chunks of the digest do are hashed as they are read, and not read again for it.
    aligned = math.lcm(row, BLOCK)
    return aligned if aligned <= 4 * BLOCK else max(1, BLOCK // row) * row


def open_models(
    recipe: Recipe,
    stack: ExitStack,
    *,
    needs: Literal["base", "weights", "deltas"],
    device: str = "cpu",
    says_other_parts: bool = False,
    projection: bool | None = None,
    besides: Collection[str] = (),
) -> Models:
    """The recipe's models, open until `stack` ends, and known to have the same tensors.

    `needs` says what will be looked at: with "weights" a base is needed only for task vectors, with "deltas" only
    for models that are not. `says_other_parts`: whether to warn of models that differ from the base in more than the
    image encoder. `projection`: whether visual projections are part of the models; by default they are if one of these,
    but for those `besides`, has its own.

    Raises:
        UsageError: there is nothing to merge, or no base. InputError: every difference between the models.
    """
    if not recipe.tuned:
        raise UsageError("there are no fine-tuned models to merge", "name them in `[tuned]` or as arguments")
    expect_all([recipe.base, *recipe.tuned.values()], recipe)
    whole = stack.enter_context(open_source(recipe.base)) if recipe.base else None
    opened = [
        Candidate(name, source, stack.enter_context(open_source(source, recipe.base)))
        for name, source in recipe.tuned.items()
    ]
    if says_other_parts:
        warn_of_other_parts(opened, whole, str(recipe.base), merged=True)
    for each in ([whole] if whole else []) + [each.opened for each in opened]:
        one_tower(each)
    base, tuned = encoders(
        whole, {each.name: each.opened for each in opened}, wanted=projection, besides=besides
    )
    vectors = [name for name, each in tuned.items() if each.is_task_vector]
    weights = [name for name in tuned if name not in vectors]
    if base is None and (needs == "base" or (vectors if needs == "weights" else weights)):
        why = "differences to it are needed"
        if needs == "weights":
            why = f"`{vectors[0]}` is a task vector"
        elif needs == "deltas":
            why = f"`{weights[0]}` is not a task vector"
        raise UsageError(f"there is no base, and {why}", "name it with `base = ...` or `--base`")
    if base is not None and base.is_task_vector:
        raise InputError(f"{base.path}: is a task vector, a base was expected")
    # a projection that is taken from it makes it an input too
    lends = any(isinstance(each, CompletedCheckpoint) and each.source for each in tuned.values())
    uses_base = base is not None and bool(
        needs == "base" or lends or (vectors if needs == "weights" else weights)
    )
    models = Models(base, tuned, recipe.seed, usable_device(device), uses_base)
    check_fit(models)
    return models


def with_own_projection(recipe: Recipe) -> bool:
    """Whether a model of the recipe that is here has a visual projection of its own: then those of all are merged."""
    if recipe.base is None:
        return False
    # what is missing or damaged is an error only for those who need it
    with suppress(MergecliError), open_source(recipe.base) as base:
        for source in recipe.tuned.values():
            with suppress(MergecliError), open_source(source, recipe.base) as opened:
                if own_encoder(opened, base).has_projection:
                    return True
    return False


def check_fit(models: Models) -> None:
    """Raises InputError with every tensor that is missing, extra, of another shape, or unequal where it must be equal."""
    reference = models.reference.entries
    whose = "the base" if models.base else f"`{next(iter(models.tuned))}`"
    heads = set.intersection(*(each.entries.keys() - reference.keys() for each in models.tuned.values()))
    heads = {name for name in heads if not name.endswith(_COUNTERS)}
    problems: list[str] = []
    details: list[str] = []
    extra: list[str] = []
    for task, each in models.tuned.items():
        # a task vector may have no tensors but those that are merged
        wanted = {
            name: Form(entry.shape, entry.dtype, entry.is_float)
            for name, entry in reference.items()
            if (entry.is_float or not each.is_task_vector) and not name.endswith(_COUNTERS)
        }
        have = {
            name: entry
            for name, entry in each.entries.items()
            if name in wanted or not (name in reference or name in heads or name.endswith(_COUNTERS))
        }
        lines = [f"{task}: {line}" for line in differences(have, wanted, f"{whose} has")]
        if other := other_architecture(have, wanted, f"{whose} has"):
            problems.append(f"{task}: {other}")
            details += lines
            continue
        problems += lines
        extra += have.keys() - wanted.keys()
        for name, form in wanted.items():
            entry = have.get(name)
            if form.any_float or entry is None or (entry.shape, entry.dtype) != (form.shape, form.dtype):
                continue
            if not models.reference.read(name).equal(each.read(name)):
                problems.append(
                    f"{task}: `{name}` ({form.dtype}) differs from that of {whose}, and is not averaged"
                )
    if not models.floats:
        problems.append(f"{whose} has no floating point tensors")
    cure = next(
        filter(None, (lead_hint(each, reference) for each in models.tuned.values())),
        leave_out_hint(extra)
        if extra and len(extra) == len(problems)
        else "merge only models that were fine-tuned from the same base",
    )
    if heads and not problems:
        cure = leave_out_hint(heads)
    if heads:
        names = quoted(sorted(heads))
        problems.append(f"every model has what {whose} has not, such as a head of its own: {names}")
    if problems:
        every = [*([models.base] if models.base else []), *models.tuned.values()]
        raise InputError(
            f"the checkpoints do not fit together:\n{listed(problems, 40)}",
            next(filter(None, map(why_foreign, every)), cure),
            listed(details, len(details)),
        )


@dataclass
class ModelPasses:
    """Repeated passes over the models; reports progress."""

    models: Models
    unit: Unit
    progress: Progress | None
    fused: bool = False
    """Whether queries, keys and values of a layer come stacked."""
    scratch: Scratch | None = None
    """Where surveys keep tensors."""

    @property
    def tensors(self) -> Sequence[str]:
        return self.models.floats

    def __call__(self, sample: int = 1) -> Iterator[Group]:
        return self.map(lambda group: group.copy(), sample)

    def shelf(self) -> Shelf:
        assert self.scratch
        return TensorShelf(self.scratch)

    def map(self, look: Callable[[Group], Result], sample: int = 1) -> Iterator[Result]:
        return self.run("surveying", lambda _, group: look(group), sample)

    def run(self, what: str, work: Callable[[int, Group], Result], sample: int = 1) -> Iterator[Result]:
        """`work(first entry, group)` of every block, in order, for one pass."""

        def counted(start: int, group: Group) -> tuple[int, Result]:
            return group.shape.numel() * sample, work(start, group)

        done = 0
        unit = self.unit if sample == 1 else Unit.ENTRY
        fused = self.fused and unit is Unit.TENSOR
        for count, result in self.models.map(counted, sample, unit=unit, fused=fused):
            yield result
            done += count
            if self.progress:
                self.progress(what, min(done, self.models.size), self.models.size)
