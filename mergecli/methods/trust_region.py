"""Trust-region task arithmetic: task vectors without the entries in which tasks would disturb each other most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from mergecli.methods._base import Group, Groups, TwoPass, total
from mergecli.methods._calibrated import Calibrated, MayMeasure, Statistics
from mergecli.methods._kth_largest import Rank, kth_largest
from mergecli.methods._settings import Fraction, Range
from mergecli.methods._task_gradients import GRADIENT, TaskGradients

if TYPE_CHECKING:
    from torch import Tensor


class Surveyed(NamedTuple):
    """What is known of the whole model."""

    threshold: float
    """The least O of the entries that are left out."""
    statistics: Statistics | None
    """The g_i; None where |tau_i| stands for them."""


@dataclass(frozen=True)
class TrustRegion(MayMeasure, TwoPass):
    """theta = theta_0 + lambda sum_i tau_i,  in the entries where  O = sum_{i != j} g_i |tau_j|  is below the
    int(density D)-th smallest of the model's D values, or 0;  theta_0 in the others

    O stands for how much a step along tau_j changes the loss of task i. With `gradients = "zero_shot"` g_i = |tau_i|, the
    paper's variant that needs no images. With "images" it is  g_i = (1 / N) sum_x |grad of cross-entropy(x)|  in the base, over N
    images x of task i. The paper takes the images' labels. Methods see none here: the base's own prediction takes their
    place. (FusionBench stores all tasks' gradients under one name, so that it keeps the base.)

    Where O is 0 no two tasks meet: such entries are kept even if a share of `density` has an O of 0, as with one task;
    FusionBench then drops them all.
    """

    title: ClassVar[str] = "task arithmetic without the entries in which tasks would disturb each other most"
    paper: ClassVar[str] = "Sun et al., Task arithmetic in trust region, ICLR 2025, arXiv 2501.15065"
    also_called: ClassVar[Mapping[str, str]] = {
        "tatr": "", "task_arithmetic_in_trust_region": "", "trust_region_ta": "",
    }  # fmt: skip
    about_images: ClassVar[frozenset[str]] = frozenset({"gradients", "gradient_examples"})

    scaling_factor: Annotated[float, Range()] = 0.3
    """lambda; 0 gives the base back."""
    density: Fraction = 0.99
    """The fraction of the model's entries that are changed; 1 leaves out those of the largest O."""
    gradients: Literal["zero_shot", "images"] = "zero_shot"
    """What g_i is: the task vector's magnitudes, or gradients on training images of each task, without labels."""
    gradient_examples: Annotated[int, Range(1)] | None = None
    """With `gradients = "images"`: how many images of each task; 128 if it is not given."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        del tasks
        if settings.get("gradients") == "images" or settings.get("gradient_examples") is None:
            return []
        return [("gradient_examples", 'is for `gradients = "images"`')]

    @property
    def support(self) -> Calibrated | None:
        return TaskGradients(examples=self.gradient_examples or 128) if self.gradients == "images" else None

    def survey(self, groups: Groups, /) -> Surveyed:
        return self.survey_with(groups, None)

    def survey_with(self, groups: Groups, learned: Statistics | None, /) -> Surveyed:
        rank = Rank(1 - self.density, lambda entries: entries - max(1, int(entries * self.density)) + 1)
        (threshold,) = kth_largest(groups, [rank], lambda group: _meeting(group, learned)[None])
        return Surveyed(float(threshold), learned)

    def merge(self, group: Group, surveyed: Surveyed, /) -> Tensor:
        meeting = _meeting(group, surveyed.statistics)
        kept = (meeting < surveyed.threshold) | (meeting == 0)
        return total(group.deltas).mul_(kept).mul_(self.scaling_factor).add_(group.base)


def _meeting(group: Group, statistics: Statistics | None) -> Tensor:
    """(...) sum_{i != j} g_i |tau_j|, summed so that nothing cancels."""

    def of_task(task: int) -> tuple[Tensor, Tensor]:
        size = group.deltas[task].abs()
        if statistics is None:
            return size, size
        stop = group.start + group.shape.numel()
        return size, statistics.read(task, f"{group.name}{GRADIENT}", group.start, stop).view(group.shape)

    sizes, gradients = (each.clone() for each in of_task(0))
    result = sizes * 0
    for task in range(1, group.tasks):
        size, gradient = of_task(task)
        result += gradients * size
        if statistics is not None:  # else both products are equal, and one orders entries as two do
            result += gradient * sizes
        sizes += size
        gradients += gradient
    return result
