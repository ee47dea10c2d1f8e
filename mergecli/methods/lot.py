"""LOT: the task vectors that change least what each task's own layers give on its own images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from mergecli.methods._base import Group, total
from mergecli.methods._calibrated import Layout, Probe, Shapes, Statistics
from mergecli.methods._gram_statistics import GramStatistics, gram_of
from mergecli.methods._least_squares import is_measured
from mergecli.methods._normal_equation import NormalEquation
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 2.0**-23
"""The rounding of float32, in which Gram matrices are kept."""


@dataclass(frozen=True)
class Lot(GramStatistics):
    """theta = theta_0 + lambda M:

    weight of a linear layer   M = (sum_i tau_i G_i) (sum_i G_i)^+,  G_i RegMean's Gram matrix of the inputs of model i
    scale of a norm            M_j = sum_i a_ij tau_ij / sum_i a_ij,  a_ij the mean of x_j^2 over its normalized inputs
    everything else            M = (1 / T) sum_i tau_i

    This is RegMean on task vectors, without shrinking and with the pseudo-inverse, so that directions which no image shows
    stay at the base. The pseudo-inverse leaves out eigenvalues up to I 2^-23 of the largest, the rounding of the stored
    matrices. The paper takes the patch embedding for a matrix too, and says nothing of other embeddings; here all are
    the mean. Its lambda is 1.2 for B/32 and 1.5 for L/14.
    """

    title: ClassVar[str] = "task vectors by least squares on each task's own inputs"
    paper: ClassVar[str] = "Sun et al., LOT-Merging, NeurIPS 2025, arXiv 2505.23859"
    published = "LOT-Merging"
    measured_as: ClassVar[str] = "lot"
    work: ClassVar[str] = "an eigendecomposition of a square matrix for each matrix"
    merge_time: ClassVar[frozenset[str]] = GramStatistics.merge_time | {"scaling_factor", "cutoff"}

    examples: Annotated[int, Range(1)] = 64
    """Images of each task that are looked at, without labels; all where a task has fewer. The paper takes 16 to 64."""
    scaling_factor: Annotated[float, Range()] = 1.2
    """lambda; 0 gives the base back."""
    cutoff: Annotated[float, Range(0)] = EPSILON
    """Eigenvalues up to I times this share of the largest count as 0."""

    def layout(self, shapes: Shapes, /) -> Layout:
        norms = {
            f"{name}.squares": ("F32", shape) for name, shape in shapes.items() if _is_scale(name, shapes)
        }
        return super().layout(shapes) | norms

    def measure(self, probe: Probe, /) -> Iterator[tuple[str, Tensor]]:
        yield from super().measure(probe)
        yield from _normalized_squares(probe, self.batch_size)

    def merge(self, group: Group, learned: Statistics, /) -> Tensor:
        if self.excludes(group.name):
            return group.base.clone()
        deltas = group.deltas
        if f"{group.name}.squares" in learned.names:
            return self._scale(group, learned).float().mul_(self.scaling_factor).add_(group.base)
        if not is_measured(group.name, tuple(group.shape)):
            return total(deltas).mul_(self.scaling_factor / group.tasks).add_(group.base)
        equation = NormalEquation()
        for task, delta in enumerate(deltas):
            equation.add_squares(delta.double(), gram_of(group, learned, task).double())
        merged = equation.truncated(self.cutoff * group.shape[1]).float()
        return merged.mul_(self.scaling_factor).add_(group.base)

    def _scale(self, group: Group, learned: Statistics) -> Tensor:
        import torch

        weighed = torch.zeros(group.shape, dtype=torch.float64, device=group.deltas.device)
        weights = torch.zeros_like(weighed)
        for task, delta in enumerate(group.deltas):
            squares = learned.read(task, f"{group.name}.squares").view(group.shape).double()
            weighed += squares * delta
            weights += squares
        return torch.where(weights > 0, weighed / weights.clamp(min=1e-300), 0.0)


def _is_scale(name: str, shapes: Shapes) -> bool:
    """Whether a tensor is the scale of a norm: a vector called weight, of a norm by its name, with a bias beside it."""
    module, _, kind = name.rpartition(".")
    return (
        kind == "weight"
        and len(shapes[name]) == 1
        and "norm" in module.rpartition(".")[2].replace("layrnorm", "norm")
        and shapes.get(f"{module}.bias") == shapes[name]
    )


def _normalized_squares(probe: Probe, size: int) -> Iterator[tuple[str, Tensor]]:
    """Name and (D,) mean over all tokens of the squares of what each norm multiplies with its scale."""
    import torch
    from torch.nn import LayerNorm

    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: Any, inputs: tuple[Tensor, ...]) -> None:
            normal = torch.nn.functional.layer_norm(inputs[0], module.normalized_shape, eps=module.eps)
            squares = normal.reshape(-1, normal.shape[-1]).double().square()
            sums[name] = sums.get(name, 0) + squares.sum(0)
            rows[name] = rows.get(name, 0) + len(squares)

        return add

    model: Any = probe.model
    norms = {name: each for name, each in model.named_modules() if isinstance(each, LayerNorm)}
    handles = [each.register_forward_pre_hook(hook(f"{name}.weight")) for name, each in norms.items()]
    try:
        with torch.no_grad():
            for batch in probe.batches(size):
                model["vision_model"](batch)
    finally:
        for each in handles:
            each.remove()
    for name, total_ in sums.items():
        yield f"{name}.squares", (total_ / rows[name]).float()
