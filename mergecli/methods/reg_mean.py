"""RegMean: linear layers that give, on every task's inputs, nearly what that task's own would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._base import Group
from mergecli.methods._calibrated import Calibrated, Layout, Probe, Shapes, Statistics, mean
from mergecli.methods._least_squares import Grams, Regression, is_linear, owner
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RegMean(Calibrated):
    """theta = mean + [sum_i G'_i]^-1 sum_i G'_i (theta_i - mean),  for the weight (transposed) of each linear layer

    G_i = (1 / n) sum_x x x^T over the inputs x of the layer in model i, every token of every image of its own task
    G'_i = alpha G_i + (1 - alpha) diag(G_i) + ridge m I,  m the mean of all diagonal entries; mean = (1 / T) sum_i theta_i

    Without a ridge this is [sum_i G'_i]^-1 sum_i G'_i theta_i as in the paper, written so that directions which no
    image shows, in which the sum has no inverse, keep the mean. Everything else is the plain mean. Solved in float64.
    """

    title: ClassVar[str] = "linear layers by least squares on each task's own inputs, else the mean"
    published = "RegMean"
    paper: ClassVar[str] = "Jin et al., ICLR 2023, arXiv 2212.09849"
    also_called: ClassVar[Mapping[str, str]] = {"clip_regmean": ""}
    elementwise: ClassVar[bool] = False
    merge_time: ClassVar[frozenset[str]] = Calibrated.merge_time | {"reduce_non_diagonal_ratio", "ridge"}

    reduce_non_diagonal_ratio: Annotated[float, Range(0, 1)] = 0.95
    """alpha: 1 is least squares, 0 weighs every input by itself."""
    ridge: Annotated[float, Range(0)] = 0.0
    """How strongly weights are drawn to the mean, as a share of the inputs' mean square; 0 is as published."""

    def layout(self, shapes: Shapes, /) -> Layout:
        return {
            f"{name}.gram": ("F32", (shape[1], shape[1]))
            for name, shape in shapes.items()
            if is_linear(name, shape) and owner(name) == name
        }

    def measure(self, probe: Probe, /) -> Iterator[tuple[str, Tensor]]:
        states = probe.activations(self.batch_size)
        for prefix, layer in probe.layers():
            with Grams(layer) as grams:
                states.step(layer)
            for name, gram in grams.means():
                yield f"{prefix}.{name}.weight.gram", gram

    def merge(self, group: Group, learned: Statistics, /) -> Tensor:
        if self.excludes(group.name):
            return group.base.clone()
        if not is_linear(group.name, tuple(group.shape)):
            return mean(group)
        middle = group.tuned.double().mean(0)
        regression = Regression(self.reduce_non_diagonal_ratio, self.ridge)
        for task, tuned in enumerate(group.tuned):
            gram = learned.read(task, f"{owner(group.name)}.gram").view(group.shape[1], group.shape[1])
            regression.add(gram, {"": tuned.double() - middle})
        return middle.add_(regression.solve()[""]).float()
