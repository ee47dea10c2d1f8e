"""Methods that learn for each task by itself: from features of its images, independent of all other tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from mergecli.methods._learned import Learner, State

if TYPE_CHECKING:
    from torch import Tensor


class FeatureProbe(Protocol):
    """One task's images, as such a method sees them; there is no way to ask for labels."""

    @property
    def task(self) -> str:
        """The task's name."""
        ...

    @property
    def seed(self) -> int:
        """The recipe's."""
        ...

    def features(self, tower: Literal["merged", "own"], /) -> Tensor:
        """(N, D) float32 unit features that the merged tower, or the task's own model, gives its images; on the CPU."""
        ...


@dataclass(frozen=True)
class TaskLearner(Learner):
    """What such methods share; what is learned for one task is kept, and serves merges of other tasks too."""

    has_plot = False
    lists_tensors = False
    part_title: ClassVar[str]
    """What the files of single tasks are called, in one word."""

    def looked_at(self, images: int) -> int:
        """How many of a task's images are looked at."""
        raise NotImplementedError

    def check_features(self, size: int) -> None:
        """Raises UsageError if the method cannot learn from features of `size` numbers."""
        raise NotImplementedError

    def learn_task(self, probe: FeatureProbe, /) -> State:
        """What is learned for one task, and its (steps,) losses."""
        raise NotImplementedError

    def joined(self, tasks: Sequence[State], /) -> State:
        """The tensors of the file, of what `learn_task` gave for each task in order."""
        raise NotImplementedError
