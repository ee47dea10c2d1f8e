"""ProDistill: a coefficient for every entry of every task vector, learned layer by layer from the layers of the tasks' models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from mergecli.methods._adam import adam_step
from mergecli.methods._base import Group, total, uniform
from mergecli.methods._calibrated import Calibrated, JointProbe, Layout, Shapes, Statistics, fill
from mergecli.methods._depth import layer_of
from mergecli.methods._settings import Range
from mergecli.runtime import interrupts

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


@dataclass(frozen=True)
class ProDistill(Calibrated):
    """theta = theta_0 + sum_i L_i * tau_i  in transformer layers, theta_0 + start sum_i tau_i  before and behind them

    with L_i of the shape of tau_i, from `start`; layer after layer, they minimize
          sum over images x of all tasks t, tokens and dimensions of  (layer(h(x); theta) - layer(h_t(x); theta_t))^2
    by Adam, in `epochs` epochs. h are activations by the layers that are merged already, h_t those by the task's own model.

    The images of all tasks are mixed in the batches, in an order that is the same for every seed; the seed draws which
    images they are. The authors' `taskwise` and `layerwise` coefficients are not here.
    """

    title: ClassVar[str] = (
        "a coefficient for each entry, learned layer by layer from the layers of the tasks' models"
    )
    paper: ClassVar[str] = "Xu et al., ProDistill, 2025, arXiv 2502.12706"
    work: ClassVar[str] = (
        "for each layer, epochs of Adam on T numbers for each of its weights; in memory 4 T + 3 layers and the activations of "
        "all images three times"
    )
    elementwise: ClassVar[bool] = False
    joint: ClassVar[bool] = True
    merge_time: ClassVar[frozenset[str]] = frozenset()

    start: Annotated[float, Range()] = 0.3
    """Every coefficient before the first step, and the one outside of layers."""
    epochs: Annotated[int, Range(0)] = 100
    """How often all images are gone through in each layer; with 0 it is task arithmetic."""
    learning_rate: Annotated[float, Range(0)] = 0.01
    """Of Adam."""
    examples: Annotated[int, Range(1)] = 64
    """Images of each task that are looked at, without labels; all where a task has fewer."""
    batch_size: Annotated[int, Range(1)] = 128
    """Images of all tasks together in a step."""

    @property
    def rounds(self) -> int:
        return max(1, self.epochs)

    def trial(self) -> ProDistill:
        return replace(self, epochs=min(1, self.epochs))

    def layout(self, shapes: Shapes, /) -> Layout:
        return {f"{name}.merged": ("F32", shape) for name, shape in shapes.items() if self._learns(name)}

    def _learns(self, name: str) -> bool:
        return layer_of(name) is not None and not self.excludes(name)

    def measure_jointly(self, probe: JointProbe, /) -> Iterator[tuple[str, Tensor]]:
        outside = [name for name, _ in probe.model.named_parameters() if layer_of(name) is None]
        tasks = range(probe.tasks)
        fill(probe.model, {name: self._plain(probe, name) for name in outside})
        merged = [self._embedded(probe, task) for task in tasks]
        own: list[Tensor] = []
        for task in tasks:
            fill(probe.model, {name: probe.tuned(task, name) for name in outside})
            own.append(self._embedded(probe, task))
        for prefix, layer in probe.layers():
            names = [name for name, _ in layer.named_parameters()]
            for task in tasks:
                fill(layer, {name: probe.tuned(task, f"{prefix}.{name}") for name in names})
                own[task] = self._output(layer, own[task])
            found = self._learned(probe, prefix, layer, names, merged, own)
            for name, value in found.items():
                if self._learns(f"{prefix}.{name}"):
                    yield f"{prefix}.{name}.merged", value
            fill(layer, found)
            merged = [self._output(layer, each) for each in merged]

    def _learned(
        self, probe: JointProbe, prefix: str, layer: Module, names: Sequence[str],
        inputs: Sequence[Tensor], wanted: Sequence[Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Name -> (...) merged weights of a layer, whose outputs come near (N, S, D) wanted ones of every task."""
        import torch

        base = {name: probe.base(f"{prefix}.{name}") for name in names}
        learned = [name for name in names if self._learns(f"{prefix}.{name}")]
        deltas = {
            name: torch.stack([probe.tuned(task, f"{prefix}.{name}") for task in range(probe.tasks)]).sub_(
                base[name]
            )
            for name in learned
        }
        shares = {name: torch.full_like(each, self.start) for name, each in deltas.items()}
        moments = {name: (torch.zeros_like(each), torch.zeros_like(each)) for name, each in deltas.items()}

        def merged() -> dict[str, Tensor]:
            return base | {name: total(deltas[name] * shares[name]).add_(base[name]) for name in learned}

        every, targets, step = torch.cat(list(inputs)), torch.cat(list(wanted)), 0
        for epoch in range(self.epochs):
            order = uniform(0, prefix, f"pro_distill epoch {epoch}", 0, len(every)).argsort(stable=True)
            for rows in order.to(every.device).split(self.batch_size):
                interrupts.check()
                step += 1
                weights = {name: each.requires_grad_(name in shares) for name, each in merged().items()}
                with torch.enable_grad():
                    out = torch.func.functional_call(layer, weights, (every[rows], None))
                    (out - targets[rows]).square().sum().backward()
                for name in learned:
                    gradient = weights[name].grad
                    assert gradient is not None
                    adam_step(shares[name], gradient * deltas[name], *moments[name], self.learning_rate, step)
        return merged()

    def _plain(self, probe: JointProbe, name: str) -> Tensor:
        """(...) task arithmetic, or the base's weights where they are excluded."""
        base = probe.base(name)
        if self.excludes(name):
            return base
        result = base.clone()
        for task in range(probe.tasks):
            result.add_(probe.tuned(task, name).sub_(base), alpha=self.start)
        return result

    def _embedded(self, probe: JointProbe, task: int) -> Tensor:
        """(N, S, D) the inputs of the first layer for a task's images, by the weights that the model has now."""
        import torch

        return torch.cat(list(probe.activations(task, self.batch_size).batches()))

    def _output(self, layer: Module, inputs: Tensor) -> Tensor:
        """(N, S, D) what the layer makes of its inputs."""
        import torch

        with torch.no_grad():
            return torch.cat([layer(each, None) for each in inputs.split(self.batch_size)])

    def merge(self, group: Group, learned: Statistics, /) -> Tensor:
        if self.excludes(group.name):
            return group.base.clone()
        if self._learns(group.name):
            return learned.read(0, f"{group.name}.merged").view(group.shape)
        return total(group.deltas).mul_(self.start).add_(group.base)
