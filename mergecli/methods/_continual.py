"""Methods that go on from an earlier merge without its experts: what a chain remembers, and what a step makes of it.

A step merges new models into what is remembered, tensor by tensor. A chain of steps, and one merge of all models in the same
order, are the same computation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from mergecli.methods._base import Group, Groups, Method

if TYPE_CHECKING:
    from torch import Tensor

Remembered = Literal["weights", "sum", "task vector"]


@dataclass(frozen=True)
class Chain:
    """What is known of the models that were merged before."""

    before: int = 0
    """How many they are; if there are any, the first row of each group is what is remembered of them."""
    numbers: Mapping[str, Sequence[float]] = field(default_factory=dict[str, "Sequence[float]"])
    """What the method remembers besides tensors, by name."""


START = Chain()
"""Nothing was merged before: all rows are models."""


class Step(NamedTuple):
    """One tensor in a step of a chain."""

    group: Group
    """The new models; before them, if there is any, what is remembered of the earlier ones."""
    chain: Chain = START
    surveyed: Any = None

    @property
    def merged(self) -> int:
        """How many models are merged after the step."""
        return self.chain.before + self.group.tasks - (self.chain.before > 0)


@dataclass(frozen=True)
class Continual(Method):
    """What such methods share besides their kind: a step, which is `remember` and then `weights`."""

    remembers: ClassVar[Remembered]
    """What of a tensor goes into the next step: the merged weights themselves, a sum of weights, or a task vector."""
    why_not_without: ClassVar[str] = ""
    """Why what a model has added cannot be taken away again; empty where it is one of the terms of a sum."""

    def survey_step(self, groups: Groups, chain: Chain, /) -> Any:
        """What a step needs to know of the whole model; None where it needs nothing."""
        del groups, chain

    def remember(self, step: Step, /) -> Tensor:
        """(...) float32, what is remembered after the step; may overwrite the group."""
        raise NotImplementedError

    def weights(self, memory: Tensor, step: Step, /) -> Tensor:
        """(...) the merged weights after the step, of what `remember` gave; may overwrite it."""
        raise NotImplementedError

    @property
    def can_recall(self) -> bool:
        """Whether what is remembered can be computed from merged weights that lie without it."""
        return False

    def recall(self, weights: Tensor, step: Step, /) -> Tensor:
        """(...) what is remembered before the step, computed from the (...) merged weights, up to rounding."""
        raise NotImplementedError

    def numbers(self, surveyed: Any, /) -> Mapping[str, Sequence[float]]:
        """The chain's numbers after the step."""
        del surveyed
        return {}

    def whole(self, step: Step, /) -> Tensor:
        """(...) the merged weights after the step."""
        return self.weights(self.remember(step), step)


class ScaledVector(Continual):
    """What methods share that remember a task vector, and whose merged weights are the base plus a multiple of it."""

    remembers: ClassVar[Remembered] = "task vector"
    scaling_factor: float
    """lambda; a setting of each of them."""

    def weights(self, memory: Tensor, step: Step, /) -> Tensor:
        return memory.mul_(self.scaling_factor).add_(step.group.base)

    @property
    def can_recall(self) -> bool:
        return self.scaling_factor != 0

    def recall(self, weights: Tensor, step: Step, /) -> Tensor:
        return (weights - step.group.base).div_(self.scaling_factor)
