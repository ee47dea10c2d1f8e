"""Methods that keep what they learn from images in one file, which is applied later without images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from mergecli.methods._base import DataDriven, Group

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
"""Tensors by name: what is learned and, while it is, the optimizer's moments."""


Need = Literal["merged_tower", "masks"]
"""A file besides the models, which the user names.

`merged_tower`: the setting `merged` names a merged checkpoint; `LearnedTensors.tower` reads it.
`masks`: the setting `masks` may name a file of a method that `gives_masks` and was learned on the same models;
`Objective.mask` reads it. It is needed while learning only.
"""


@dataclass(frozen=True)
class LearnedTensors:
    """What `merge` gets: the tensors of the file, and what reads those that are too large to be held."""

    tasks: tuple[str, ...]
    names: tuple[str, ...]
    """The merged tensors; the columns of tensors that have one."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the merged tensors, in that order."""
    tensors: Mapping[str, Tensor]
    seed: int
    """What random masks are drawn from."""
    read: Callable[[str, int, int], Tensor]
    """`read(key, first entry, end)` gives (n,) entries of one of the `streamed` tensors."""
    tower: Callable[[str, int, int], Tensor] | None = None
    """The same of the merged tower's float32 weights, for methods that need it."""


@dataclass(frozen=True)
class Learner(DataDriven):
    """Methods whose learned tensors are one file; `Adapted` learns for all tasks together, `TaskLearner` task by task."""

    kept_as = "coefficients"
    merge_time: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[Need]] = frozenset()
    gives_masks: ClassVar[bool] = False
    """Whether the file holds mask logits that a method with the need `masks` can begin with."""
    changeable: ClassVar[frozenset[str]] = frozenset()
    """Settings that may have another value when the file is applied than when it was learned."""
    not_learned_from: ClassVar[frozenset[str]] = frozenset()
    """Those of them that the learning does not read: what was learned once serves all their values."""
    derived: ClassVar[frozenset[str]] = frozenset()
    """Settings that the learning finds out where they are 0; `completed` fills them in."""
    streamed: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the keys of tensors that are as large as the models, and read as they are needed."""
    has_plot: ClassVar[bool] = True
    """Whether there is a plot of the trace."""
    file_title: ClassVar[str] = "coefficients"
    """What a merged tower calls the file among its inputs; no task has such a name."""
    lists_tensors: ClassVar[bool] = True
    """Whether what is learned belongs to the models' tensors, whose names the file then lists."""

    @classmethod
    def needed(cls) -> list[str]:
        return [*super().needed(), *["merged tower"] * ("merged_tower" in cls.needs)]

    @property
    def loss(self) -> tuple[str, str]:
        """What the trace calls the loss of a step, and the key of the (steps, T) losses in the file."""
        return "entropy", "trace.entropies"

    def file_shapes(
        self, tasks: int, tensors: Mapping[str, tuple[int, ...]], /
    ) -> dict[str, tuple[int, ...]]:
        """Key -> shape of what the file must hold, learned on merged tensors of these names and shapes."""
        raise NotImplementedError

    def completed(self, learned: State, /) -> Self:
        """The method with the settings that only the learning could know."""
        del learned
        return self

    def renewed(self, learned: LearnedTensors, tensors: Mapping[str, tuple[int, ...]], /) -> State:
        """Tensors of the file made again, because settings of `changeable` have other values."""
        del learned, tensors
        return {}

    def merge(self, group: Group, learned: LearnedTensors, /) -> Tensor:
        raise NotImplementedError
