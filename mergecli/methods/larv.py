"""LARV: layers scaled by how much their task vectors say and how much they disturb the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from mergecli.methods._base import Group, Groups, Method
from mergecli.methods._depth import layer_of
from mergecli.methods._least_squares import is_linear
from mergecli.methods._modifier import Modifier
from mergecli.methods._settings import Range
from mergecli.methods._svd import gram
from mergecli.methods.task_arithmetic import TaskArithmetic

if TYPE_CHECKING:
    from torch import Tensor


class Surveyed(NamedTuple):
    """The scale of each layer, and what the other method surveyed of what they scale."""

    scales: Mapping[int, float]
    inner: Any


@dataclass(frozen=True)
class Larv(Modifier):
    """theta = what `of` merges of theta_0 + s_l tau_i,  l = 1 ... L the tensor's layer:

    e = the mean of r_eff(W_0) / (r_eff(tau_i) + 1e-12),  r_eff(A) = exp(-sum_j p_j log p_j),  p_j = sigma_j^2 / sum sigma^2
    c = the mean of (|W_0 tau_i^T - tau_i W_0^T| + |W_0^T tau_i - tau_i^T W_0|) / (2 |W_0| |tau_i|)
    z = e^eta (l / L)^rho / (1 + softplus(c')),  c' the c of all layers with mean 0 and deviation 1

    s_l = the tier of z: `tiers` in equal shares of the layers, from the lowest z; or 1 + 0.5 tanh(3 (z - 1))

    Means are over the weights of the layer's linear layers and over all tasks. Embeddings and their norm have the scale of
    the first layer, what is behind the layers that of the last. Task vectors that are 0 are left out of the means.

    Not public: the tiers for CLIP and their shares, what is put together of a layer, and what other tensors get. All
    these are ours, and the tiers are not tuned.
    """

    title: ClassVar[str] = (
        "layers scaled, before another method merges them, by their task vectors' rank and conflict"
    )
    paper: ClassVar[str] = "Wang et al., LARV, 2026, arXiv 2602.09413, equation 8 as a port has it"
    work: ClassVar[str] = (
        "an eigendecomposition of each matrix of each model, and one more reading of the models"
    )
    elementwise: ClassVar[bool] = False

    of: Method = TaskArithmetic()  # noqa: RUF009
    """The method that merges the scaled task vectors; the paper has Iso-C."""
    gate: Literal["tiers", "tanh"] = "tiers"
    """How a layer's score becomes its scale."""
    tiers: tuple[Annotated[float, Range(0)], ...] = (0.5, 1.0, 1.2)
    """Of tiers: the scales, from the layers of lowest score to those of highest; all 1 change nothing. Ours."""
    richness: Annotated[float, Range()] = 1.0
    """eta."""
    depth: Annotated[float, Range()] = 0.5
    """rho."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        del tasks
        return [("tiers", "expected at least one scale")] if settings.get("tiers") in ([], ()) else []

    @property
    def reads(self) -> int:
        return self.of.reads + 1

    def survey(self, groups: Groups, /) -> Surveyed:
        found: dict[int, list[tuple[float, float]]] = {
            layer: [] for name in groups.tensors if (layer := layer_of(name)) is not None
        }
        for several in groups.map(lambda group: [_facts(each) for each in group.apart()]):
            for layer, facts in several:
                if layer is not None:
                    found[layer] += facts
        scales = self._scales({layer: facts for layer, facts in sorted(found.items()) if facts})
        return Surveyed(scales, self.survey_of(groups, Surveyed(scales, None)))

    def inner(self, surveyed: Surveyed, /) -> Any:
        return surveyed.inner

    def before(self, group: Group, surveyed: Surveyed, /) -> Group:
        scale = _scale_of(group, surveyed.scales)
        if scale != 1:
            group.deltas.mul_(scale)
        return group

    def _scales(self, layers: Mapping[int, list[tuple[float, float]]]) -> dict[int, float]:
        """Layer -> its scale, from the (e, c) of its matrices and tasks."""
        import torch

        if not layers:
            return {}
        means = torch.tensor(
            [[sum(each) / len(facts) for each in zip(*facts, strict=True)] for facts in layers.values()],
            dtype=torch.float64,
        )
        rich, conflict = means.unbind(1)
        deviation = conflict.std(correction=0)
        apart = (conflict - conflict.mean()) / (deviation if deviation > 1e-12 else 1)
        depth = (torch.tensor([*layers], dtype=torch.float64) + 1) / (max(layers) + 1)
        scores = rich**self.richness * depth**self.depth / (1 + torch.nn.functional.softplus(apart))
        if self.gate == "tanh":
            scales = 1 + 0.5 * torch.tanh(3 * (scores - 1))
            return dict(zip(layers, scales.tolist(), strict=True))
        order = scores.argsort(stable=True).argsort(stable=True)
        return {
            layer: self.tiers[place * len(self.tiers) // len(layers)]
            for layer, place in zip(layers, order.tolist(), strict=True)
        }


def _scale_of(group: Group, scales: Mapping[int, float]) -> float:
    from mergecli.methods._depth import depths

    if not scales:
        return 1.0
    name = group.members[0] if group.members else group.name
    layer = layer_of(name)
    if layer is None:
        # without layers beside it, only a tensor that is known to come behind them has a depth of 1
        layer = max(scales) if depths([name, "layers.0.", "layers.1."])[name] else min(scales)
    return scales.get(layer, 1.0)


def _facts(group: Group) -> tuple[int | None, list[tuple[float, float]]]:
    """A linear layer's number and the (e, c) of each task; no facts of other tensors, and of tasks equal to the base."""
    if not is_linear(group.name, tuple(group.shape)):
        return None, []
    base = group.base.double()
    pairs = [(base, row.double()) for row in group.deltas if bool(base.any()) and bool(row.any())]
    return layer_of(group.name), [_richness_and_conflict(*pair) for pair in pairs]


def _richness_and_conflict(base: Tensor, delta: Tensor) -> tuple[float, float]:
    """e and c of one (O, I) float64 matrix and task."""
    if base.shape[1] > base.shape[0]:  # neither minds which side is which
        base, delta = base.T, delta.T
    ours, theirs, mixed = gram(base), gram(delta), base.T @ delta
    # |W D^T - D W^T|^2 = 2 tr(W^T W D^T D) - 2 tr((W^T D)^2)
    outer = 2 * float((ours * theirs).sum()) - 2 * float((mixed * mixed.T).sum())
    clash = (max(outer, 0.0) ** 0.5 + float((mixed - mixed.T).norm())) / (
        2 * float(base.norm() * delta.norm())
    )
    return _effective_rank(ours) / (_effective_rank(theirs) + 1e-12), clash


def _effective_rank(squares: Tensor) -> float:
    """exp of the entropy of the eigenvalues of A^T A as shares of their sum: 1 for rank one, r for r equal singular values."""
    import torch

    values = torch.linalg.eigvalsh(squares).clamp_(min=0)
    return float(torch.special.entr(values / values.sum()).sum().exp())
