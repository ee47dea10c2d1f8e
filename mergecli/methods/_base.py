"""What a merging method is: a frozen dataclass of settings with one or two functions of tensors.

Letters in shapes: T tasks, n entries of a block, `...` the tensor's own shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from mergecli.runtime.errors import UsageError

if TYPE_CHECKING:
    from torch import Size, Tensor

Result = TypeVar("Result")

RUN = 1 << 16
"""Random numbers are drawn for this many consecutive entries at a time, whatever the size of the blocks."""


class Unit(IntEnum):
    """What of a tensor must be merged together; the smaller it is, the less memory is needed."""

    ENTRY = 0
    ROW = 1
    """What belongs to one index of the first dimension; a vector is one row."""
    TENSOR = 2


class Group:
    """One named tensor, or a block of its entries or rows, across all models, in float32 and in the recipe's order.

    The rows belong to whoever receives the group: methods may overwrite them; the base is only read.
    """

    def __init__(
        self,
        name: str,
        base: Tensor | None,
        rows: Tensor,
        are_deltas: tuple[bool, ...],
        names: tuple[str, ...],
        seed: int = 0,
        start: int = 0,
        members: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.names = names
        """The tasks, in order."""
        self.members = members
        """The tensors that are stacked here along the first dimension, equal in shape; none where it is one tensor."""
        self._base = base
        self._rows = rows
        self._are_deltas = are_deltas
        self._seed = seed
        self._start = start

    @property
    def tasks(self) -> int:
        """T, the number of fine-tuned models."""
        return len(self._rows)

    @property
    def shape(self) -> Size:
        """The shape of the base, of each row of `deltas`, and of the result."""
        return self._rows.shape[1:]

    @property
    def start(self) -> int:
        """Which entry of the flattened tensor the block begins with; 0 where the group is the whole tensor."""
        return self._start

    @property
    def base(self) -> Tensor:
        """(...) the base's weights."""
        if self._base is None:
            raise ValueError("this method was not given a base: set `needs_base`")
        return self._base

    @property
    def tuned(self) -> Tensor:
        """(T, ...) the fine-tuned weights."""
        return self._as_deltas(wanted=False)

    @property
    def deltas(self) -> Tensor:
        """(T, ...) the task vectors, fine-tuned minus base."""
        return self._as_deltas(wanted=True)

    def _as_deltas(self, *, wanted: bool) -> Tensor:
        for row, is_delta in zip(self._rows, self._are_deltas, strict=True):
            if wanted and not is_delta:
                row.sub_(self.base)
            elif is_delta and not wanted:
                row.add_(self.base)
        self._are_deltas = (wanted,) * self.tasks
        return self._rows

    def copy(self) -> Group:
        """The same group with tensors of its own."""
        base, rows = None if self._base is None else self._base.clone(), self._rows.clone()
        return self._of(self.name, base, rows, self._start, self.members)

    def every(self, step: int) -> Group:
        """One entry in `step`, as a flat group with tensors of its own."""
        base = None if self._base is None else self._base.flatten()[::step]
        rows = self._rows.flatten(1)[:, ::step].clone()
        return self._of(self.name, base, rows, self._start, ())

    def of_rows(self, rows: Tensor, names: tuple[str, ...], *, are_deltas: bool) -> Group:
        """The same tensor of other models, whose (T, ...) rows are all of one kind."""
        kinds = (are_deltas,) * len(names)
        return Group(self.name, self._base, rows, kinds, names, self._seed, self._start, self.members)

    def apart(self) -> list[Group]:
        """The stacked tensors, each as a group of its own that shares this one's memory; itself if it is one tensor."""
        if not self.members:
            return [self]
        bases = [None] * len(self.members) if self._base is None else self._base.chunk(len(self.members))
        rows = self._rows.chunk(len(self.members), dim=1)
        return [self._of(*each, 0, ()) for each in zip(self.members, bases, rows, strict=True)]

    def named(self, merged: Tensor) -> dict[str, Tensor]:
        """Tensor's name -> its part of a (...) result."""
        if not self.members:
            return {self.name: merged}
        return dict(zip(self.members, merged.chunk(len(self.members)), strict=True))

    def _of(
        self, name: str, base: Tensor | None, rows: Tensor, start: int, members: tuple[str, ...]
    ) -> Group:
        return Group(name, base, rows, self._are_deltas, self.names, self._seed, start, members)

    def uniform(self, task: int) -> Tensor:
        """(...) random numbers in [0, 1) for one task's entries.

        They depend on the recipe's seed, the tensor's name, the task's name and the entry only, so that order of the
        tasks, block size, device and threads change nothing.
        """
        return self.drawn(self.names[task], self._seed)

    def uniform_numbers(self, task: int, count: int) -> Tensor:
        """(count,) random numbers in [0, 1) that depend on the recipe's seed, the tensor's and the task's name only."""
        return uniform(self._seed, self.name, self.names[task], 0, count).to(self._rows.device)

    def drawn(self, label: str, seed: int) -> Tensor:
        """(...) random numbers in [0, 1) that depend on seed, tensor's name, label and entry only."""
        stop = self._start + self.shape.numel()
        return uniform(seed, self.name, label, self._start, stop).view(self.shape).to(self._rows.device)


def uniform(seed: int, name: str, label: str, start: int, stop: int) -> Tensor:
    """(stop - start,) random numbers in [0, 1) for entries of a named tensor, drawn by the CPU."""
    import hashlib

    import torch

    runs: list[Tensor] = []
    first = start // RUN
    for run in range(first, -(-stop // RUN)):
        key = f"{seed} {name} {label} {run}".encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "little")
        runs.append(torch.rand(RUN, generator=torch.Generator().manual_seed(number)))
    drawn = torch.cat(runs) if runs else torch.empty(0)
    return drawn[start - first * RUN : stop - first * RUN]


def gaussian(radius: Tensor, angle: Tensor) -> Tensor:
    """(...) normal random numbers from two of (...) uniform ones (Box and Muller)."""
    import math

    import torch

    return torch.sqrt(-2 * torch.log1p(-radius)) * torch.cos(2 * math.pi * angle)


class Shelf(Protocol):
    """Merged tensors that a survey keeps for the merge, on disk beside the output; gone when the merge ends."""

    def put(self, name: str, value: Tensor, /) -> None:
        """Keeps a float32 tensor."""
        ...

    def get(self, name: str, /) -> Tensor:
        """(n,) its entries, flat; they belong to whoever asked."""
        ...


class Groups(Protocol):
    """One pass over all tensors of all models; each call reads the files once."""

    @property
    def tensors(self) -> Sequence[str]:
        """The names of all tensors that are merged, known without a pass."""
        ...

    def __call__(self, sample: int = 1) -> Iterator[Group]:
        """The groups in order; with `sample = s`, only about one entry in s of every tensor, evenly spread."""
        ...

    def map(self, look: Callable[[Group], Result], sample: int = 1) -> Iterator[Result]:
        """What `look` gives for each group, in order; groups are looked at in several threads.

        `look` may overwrite the group's tensors, and returns none of them.
        """
        ...

    def shelf(self) -> Shelf:
        """A new, empty one."""
        ...


KINDS = {
    "weights only": "the checkpoints and nothing else",
    "continual": "the checkpoints one after another, and what an earlier merge left",
    "a few images": "training images of each task, without labels, measured once",
    "test-time": "images of each task, without labels, to learn from",
    "routed": "no task is named: each image or token has weights of its own",
    "task-conditioned": "you name the task of each image, which has a tower of its own",
    "modifiers": "another method, whose input or output they change",
}
"""Kind of method -> what such methods need, in a few words, in the order of lists."""


@dataclass(frozen=True)
class LayerLine:
    """One `[[method.layers]]` of a recipe: what becomes of the tensors that it matches and no line before it does."""

    match: tuple[str, ...]
    """Patterns, of which one must match."""
    keep: str | None
    """`base` or the task whose weights are copied; None where the method merges."""
    settings: Mapping[str, Any] = field(hash=False)
    """As written: those that differ from the method's own, perhaps with gradients."""
    first: Method = field(hash=False)
    """The method with these settings, at the first layer."""
    last: Method = field(hash=False)
    """The same at the last layer; another one where a setting has a gradient."""


@dataclass(frozen=True)
class Method:
    """What all kinds share. A method's docstring is its equation; each setting is documented under its field."""

    title: ClassVar[str]
    """The method's name and one line about it, for lists."""
    paper: ClassVar[str]
    """Where it comes from."""
    kind: ClassVar[str] = "weights only"
    """One of `KINDS`."""
    needs_base: ClassVar[bool] = True
    """Whether the method cannot merge without a base."""
    elementwise: ClassVar[bool] = True
    """Whether an entry of the result depends only on the same entry of the models, so that tensors can be merged in blocks."""
    passes: ClassVar[int] = 1
    """How many times every model is read from disk."""
    work: ClassVar[str] = ""
    """The cost besides reading the models, in words; empty if there is none."""
    looks_at: ClassVar[str] = "no images"
    """Which images are needed."""
    published: ClassVar[str] = ""
    """The method's row in the published tables; `{setting}` stands for what a setting says, capitalized."""
    merge_time: ClassVar[frozenset[str]] = frozenset({"scaling_factor"})
    """Settings that only `merge` reads: methods that differ in nothing else share one survey, or what was learned."""
    also_called: ClassVar[Mapping[str, str]] = {}
    """Name in papers or other tools -> the setting, `key=value`, that gives that version; empty where the defaults do."""
    not_recorded: ClassVar[frozenset[str]] = frozenset()
    """Settings that no number depends on; results do not record them."""

    layers: tuple[LayerLine, ...] = field(default=(), kw_only=True)
    """Settings by layer. No setting of a method itself: `_layers` says what they do."""

    @classmethod
    def needed(cls) -> list[str]:
        """What must be there besides the fine-tuned models, a word each."""
        return ["base"] * cls.needs_base + ["images"] * (cls.looks_at != Method.looks_at)

    @property
    def reads_base(self) -> bool:
        """Whether this method, with its settings by layer, cannot merge without a base."""
        return self.needs_base or any(line.keep == "base" for line in self.layers)

    @property
    def unit(self) -> Unit:
        """What the method must be given together: it may get blocks of entries or of rows in place of the tensor."""
        return Unit.ENTRY if self.elementwise else Unit.TENSOR

    @property
    def fuses(self) -> bool:
        """Whether the weights of queries, keys and values of a layer are merged as one matrix, stacked in that order, as
        open_clip keeps them."""
        return False

    @property
    def keeps_projection(self) -> bool:
        """Whether a visual projection that the models have fine-tuned stays that of the base."""
        return False

    @property
    def reads(self) -> int:
        """How many times this method, with these settings, reads every model."""
        return self.passes

    @property
    def against_adapters(self) -> str:
        """What is published against merging the weights of adapters by this method, as a warning; empty if nothing is."""
        return ""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        """(setting, problem) pairs of settings that are each valid but do not fit the models of these `tasks`."""
        del tasks, settings
        return []


@dataclass(frozen=True)
class PerTensor(Method):
    """Methods that look at one tensor at a time: one pass."""

    def merge(self, group: Group, /) -> Tensor:
        """(...) the merged weights of the group's tensor, float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class TwoPass(Method):
    """Methods that must survey the whole model before they can merge a tensor."""

    passes: ClassVar[int] = 2

    def survey(self, groups: Groups, /) -> Any:
        """What `merge` needs to know of the whole model."""
        raise NotImplementedError

    def survey_with(self, groups: Groups, learned: Any, /) -> Any:
        """The same, with the statistics that the settings ask for, or None."""
        del learned
        return self.survey(groups)

    def merge(self, group: Group, surveyed: Any, /) -> Tensor:
        """(...) the merged weights of the group's tensor, float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class DataDriven(Method):
    """Methods that look at images before they merge, and keep what they learned as files.

    `_calibrated` has those that keep statistics, a file a task; `_learned` those that keep one file for all tasks.
    """

    kept_as: ClassVar[Literal["statistics", "coefficients"]]
    """The kind of those files, which says which options of `merge` name them."""
    needs_head: ClassVar[bool] = False
    """Whether logits are looked at, so that class names and prompts matter."""

    def merge(self, group: Group, learned: Any, /) -> Tensor:
        """(...) the merged weights of the group's tensor, float32; `learned` is what the files hold."""
        raise NotImplementedError


def merge_group(method: Method, group: Group, surveyed: Any) -> Tensor:
    """(...) the merged weights of one group by a method of any kind.

    Raises:
        UsageError: they do not have the group's shape.
    """
    if isinstance(method, TwoPass | DataDriven):
        result = method.merge(group, surveyed)
    else:
        assert isinstance(method, PerTensor)
        result = method.merge(group)
    expect_shape(method, "merge", group.name, result, group.shape)
    return result


def expect_shape(method: Method, function: str, name: str, result: Any, shape: Sequence[int]) -> None:
    """Raises UsageError unless what a method's function gave for a tensor has the shape that it must have."""
    found = getattr(result, "shape", None)
    if found != tuple(shape):
        got = "nothing" if result is None else f"a {type(result).__name__}" if found is None else tuple(found)
        raise UsageError(
            f"{type(method).__module__.replace('.', '/')}.py: `{function}` of `{name}`: "
            f"expected a tensor of shape {tuple(shape)}, got {got}"
        )


def total(rows: Tensor) -> Tensor:
    """(...) the sum of (T, ...) rows, added from the first to the last, so that it never depends on the layout."""
    result = rows[0].clone()
    for row in rows[1:]:
        result += row
    return result
