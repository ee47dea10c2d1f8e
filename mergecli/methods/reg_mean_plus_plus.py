"""RegMean++: RegMean layer by layer, on what the layers merged before give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergecli.methods._base import Group
from mergecli.methods._calibrated import Calibrated, JointProbe, Layout, Shapes, Statistics, fill, mean
from mergecli.methods._depth import layer_of
from mergecli.methods._least_squares import Grams, Regression, is_measured, owner, within
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RegMeanPlusPlus(Calibrated):
    """theta as in RegMean, from the first layer to the last:

    G_i = (1 / n) sum_x x x^T over the inputs x of layer l of model i, given what layers 0 ... l - 1 as merged give for
    the images of task i, in front of which embeddings and their norm are the mean; then layer l is merged

    The visual projection, where it is merged, is one more layer, whose norm before it is the mean. The weights of linear layers are what is measured: each depends on all models and on the layers before it. Everything
    else is the plain mean. FusionBench leaves the post-layernorm as it is in the base, and matches `exclude` with names
    inside of a layer, such as `self_attn.q_proj.weight`; here they are the tensor's own.
    """

    title: ClassVar[str] = "linear layers as in RegMean, one after another, on what those merged before give"
    published = "RegMean++"
    paper: ClassVar[str] = "Nguyen et al., 2025, arXiv 2508.03121"
    elementwise: ClassVar[bool] = False
    joint: ClassVar[bool] = True
    merge_time: ClassVar[frozenset[str]] = frozenset({"post_layernorm"})

    reduce_non_diagonal_ratio: Annotated[float, Range(0, 1)] = 0.95
    """alpha: 1 is least squares, 0 weighs every input by itself."""
    ridge: Annotated[float, Range(0)] = 0.0
    """How strongly weights are drawn to the mean, as a share of the inputs' mean square; 0 is as published."""
    post_layernorm: Literal["average", "base"] = "average"
    """The norm behind the layers: the mean like all others, or the base's as in FusionBench."""

    def layout(self, shapes: Shapes, /) -> Layout:
        return {
            f"{name}.merged": ("F32", shape)
            for name, shape in shapes.items()
            if is_measured(name, shape) and not self.excludes(name)
        }

    def measure_jointly(self, probe: JointProbe, /) -> Iterator[tuple[str, Tensor]]:
        outside = [name for name, _ in probe.model.named_parameters() if layer_of(name) is None]
        fill(probe.model, {name: self._plain(probe, name) for name in outside})
        states = [probe.activations(task, self.batch_size) for task in range(probe.tasks)]
        for prefix, layer in chain(probe.layers(), probe.behind()):
            names = {name: within(prefix, name) for name, _ in layer.named_parameters()}
            merged = {name: self._plain(probe, full) for name, full in names.items()}
            systems: dict[str, Regression] = {}
            for task, inputs in enumerate(states):
                fill(layer, {name: probe.tuned(task, full) for name, full in names.items()})
                with Grams(layer) as grams:
                    inputs.look(layer)
                own = layer.state_dict()
                for module, gram in grams.means():
                    changes = {
                        name: own[name].double() - merged[name].double()
                        for name, full in names.items()
                        if name.endswith(".weight")
                        and owner(name) == f"{module}.weight"
                        and not self.excludes(full)
                    }
                    system = systems.setdefault(
                        module, Regression(self.reduce_non_diagonal_ratio, self.ridge)
                    )
                    system.add(gram, changes)
            for system in systems.values():
                for name, change in system.solve().items():
                    merged[name] = (merged[name] + change).float()
                    yield f"{names[name]}.merged", merged[name]
            fill(layer, merged)
            for inputs in states:
                inputs.step(layer)

    def _plain(self, probe: JointProbe, name: str) -> Tensor:
        """(...) the mean of the tasks' weights, or the base's where they are excluded."""
        if self.excludes(name):
            return probe.base(name)
        summed = probe.tuned(0, name)
        for task in range(1, probe.tasks):
            summed += probe.tuned(task, name)
        return summed.div_(probe.tasks)

    def merge(self, group: Group, learned: Statistics, /) -> Tensor:
        behind = self.post_layernorm == "base" and "post_layernorm" in group.name
        if self.excludes(group.name) or behind:
            return group.base.clone()
        if not is_measured(group.name, tuple(group.shape)):
            return mean(group)
        return learned.read(0, f"{group.name}.merged").view(group.shape)
