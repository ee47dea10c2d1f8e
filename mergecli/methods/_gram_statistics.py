"""What RegMean measures, and the methods that read the same: Gram matrices of the inputs of linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, ClassVar

from mergecli.methods._base import Group
from mergecli.methods._calibrated import Calibrated, Layout, Probe, Shapes, Statistics
from mergecli.methods._least_squares import Grams, is_measured, owner, within

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GramStatistics(Calibrated):
    """G_i = (1 / n) sum_x x x^T over the inputs x of each linear layer in model i, every token of every image of its own
    task; queries, keys and values share one. Of the visual projection, where that is merged, x is what the tower gives.
    Statistics that one such method measured serve the others."""

    measured_as: ClassVar[str] = "reg_mean"
    elementwise: ClassVar[bool] = False

    def layout(self, shapes: Shapes, /) -> Layout:
        return {
            f"{name}.gram": ("F32", (shape[1], shape[1]))
            for name, shape in shapes.items()
            if is_measured(name, shape) and owner(name) == name
        }

    def measure(self, probe: Probe, /) -> Iterator[tuple[str, Tensor]]:
        states = probe.activations(self.batch_size)
        for prefix, layer in chain(probe.layers(), probe.behind()):
            with Grams(layer) as grams:
                states.step(layer)
            for name, gram in grams.means():
                yield f"{within(prefix, name)}.weight.gram", gram


def gram_of(group: Group, learned: Statistics, task: int) -> Tensor:
    """(I, I) float32 Gram matrix of a task's inputs of the (O, I) weight in the group, which may be stacked of several."""
    first = group.members[0] if group.members else group.name
    return learned.read(task, f"{owner(first)}.gram").view(group.shape[1], group.shape[1])
