"""AdaMerging and Concrete as FusionBench describes them: every merged weight is a function of what is learnt, and autograd
differentiates it; Adam is torch's own. In float64, so that differences are our rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.golden.naive import Weights, flat, unflat

Uniform = Callable[[str, str, Tensor], Tensor]
"""(name, label, like) -> random numbers in [0, 1)."""


@dataclass(frozen=True)
class Sight:
    """What a merged tower is judged by."""

    classify: Callable[[Mapping[str, Tensor], Tensor, int], Tensor]
    """(weights, pixels, place of the task) -> (B, C) logits."""
    batches: Callable[[int], list[tuple[int, Tensor]]]
    """Number of the draw -> the place of each task that is looked at, and its pixels."""

    def loss(self, weights: Mapping[str, Tensor], draw: int) -> tuple[Tensor, list[float]]:
        """() the sum of the entropies, and each."""
        each: list[Tensor] = []
        for place, pixels in self.batches(draw):
            chances = self.classify(weights, pixels, place).softmax(-1)
            each.append((-chances * torch.log(chances + 1e-8)).sum(-1).mean())
        return torch.stack(each).sum(), torch.stack(each).tolist()


@dataclass(frozen=True)
class Found:
    """What was learnt, what it merges to, and the entropies of each step."""

    merged: Weights
    coefficients: Tensor
    logits: Weights
    entropies: list[list[float]]


def deltas_of(base: Weights, tuned: Sequence[Weights]) -> list[Weights]:
    return [{name: model[name].double() - base[name].double() for name in base} for model in tuned]


def ties_kept(base: Weights, tuned: Sequence[Weights], density: float) -> list[Weights]:
    """The entries of each task vector that TIES keeps and whose sign is the elected one."""
    vectors = torch.stack([flat(model) - flat(base) for model in tuned])
    kept = int(vectors.shape[1] * density)
    least = vectors.abs().sort(1, descending=True).values[:, kept - 1 : kept]
    trimmed = torch.where(vectors.abs() >= least, vectors, 0)
    agreeing = torch.where(trimmed * trimmed.sum(0).sign() > 0, trimmed, 0)
    return [unflat(row.double(), base) for row in agreeing]


def weighted(base: Weights, deltas: Sequence[Weights], c: Tensor, masks: Weights | None = None) -> Weights:
    """base + mask * sum_i c_i delta_i, c of shape (T, P) or (T, 1)."""
    merged: Weights = {}
    for number, (name, value) in enumerate(base.items()):
        own = c[:, number if c.shape[1] > 1 else 0]
        change = sum(own[i] * delta[name] for i, delta in enumerate(deltas))
        merged[name] = value.double() + (change if masks is None else masks[name] * change)  # type: ignore[operator]
    return merged


def started(base: Weights, tasks: int, granularity: str, start: float) -> Tensor:
    shape = (tasks, len(base) if granularity == "layer" else 1)
    return torch.full(shape, start, dtype=torch.float64, requires_grad=True)


def ada_merging(
    sight: Sight, base: Weights, tuned: Sequence[Weights], *, steps: int, learning_rate: float, start: float = 0.3,
    granularity: str = "layer", clamp: bool = False, density: float | None = None,
) -> Found:  # fmt: skip
    deltas = deltas_of(base, tuned) if density is None else ties_kept(base, tuned, density)
    c = started(base, len(tuned), granularity, start)

    def merged() -> Weights:
        return weighted(base, deltas, c.clamp(0, 1) if clamp else c)

    optimizer = torch.optim.Adam([c], lr=learning_rate)
    entropies: list[list[float]] = []
    for step in range(steps):
        loss, each = sight.loss(merged(), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        entropies.append(each)
    with torch.no_grad():
        return Found(merged(), c.clamp(0, 1) if clamp else c.detach(), {}, entropies)


def sampled(logits: Weights, uniform: Uniform, label: str, temperature: float) -> Weights:
    """Rescaled samples of the concrete distribution."""
    eps = torch.finfo(torch.float32).eps
    masks: Weights = {}
    for name, phi in logits.items():
        u = uniform(name, label, phi).clamp(eps, 1 - eps).double()
        mask = torch.sigmoid((torch.log(u) - torch.log(1 - u) + phi) / temperature)
        masks[name] = mask / mask.mean()
    return masks


def kept(logits: Weights, uniform: Uniform, temperature: float, kind: str) -> Weights:
    if kind == "sample":
        return sampled(logits, uniform, "final mask", temperature)
    masks = {name: torch.sigmoid(phi) for name, phi in logits.items()}
    if kind == "discrete":
        masks = {name: (uniform(name, "final mask", m) < m).double() for name, m in masks.items()}
    return {name: mask / mask.mean() if mask.any() else mask for name, mask in masks.items()}


def zeros(base: Weights, initial: float) -> Weights:
    return {
        name: torch.full_like(value, initial, dtype=torch.float64).requires_grad_()
        for name, value in base.items()
    }


def concrete_task_arithmetic(
    sight: Sight, base: Weights, tuned: Sequence[Weights], uniform: Uniform, *, steps: int, learning_rate: float,
    scaling_factor: float = 0.3, temperature: float = 0.5, initial_logits: float = 0.0, mask: str = "sample",
) -> Found:  # fmt: skip
    deltas, logits = deltas_of(base, tuned), zeros(base, initial_logits)
    c = torch.full((len(tuned), 1), scaling_factor, dtype=torch.float64)
    optimizer = torch.optim.Adam(logits.values(), lr=learning_rate)
    entropies: list[list[float]] = []
    for step in range(steps):
        masks = sampled(logits, uniform, f"step {step}", temperature)
        loss, each = sight.loss(weighted(base, deltas, c, masks), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        entropies.append(each)
    with torch.no_grad():
        return Found(
            weighted(base, deltas, c, kept(logits, uniform, temperature, mask)), c, logits, entropies
        )


def concrete_ada_merging(
    sight: Sight, base: Weights, tuned: Sequence[Weights], uniform: Uniform, *, mask_steps: int, steps: int,
    learning_rate: float, mask_rate: float, inner_rate: float = 1.0, start: float = 0.3, temperature: float = 0.5,
    granularity: str = "layer", mask: str = "sample", order: str = "corrected",
) -> Found:  # fmt: skip
    deltas, logits = deltas_of(base, tuned), zeros(base, 0.0)
    c = started(base, len(tuned), granularity, start)
    inner = torch.optim.Adam([c], lr=inner_rate)
    outer = torch.optim.Adam(logits.values(), lr=mask_rate)
    entropies: list[list[float]] = []
    for step in range(mask_steps):
        masks = sampled(logits, uniform, f"step {step}", temperature)
        fixed = {name: each.detach() for name, each in masks.items()}
        if order == "corrected":
            c.data.fill_(start)
            (slope,) = torch.autograd.grad(sight.loss(weighted(base, deltas, c, fixed), 2 * step)[0], c)
            c.data -= inner_rate * slope
        else:
            merged = weighted(base, deltas, c, fixed)
            c.data.fill_(start)
            c.grad = torch.autograd.grad(sight.loss(merged, 2 * step)[0], c)[0]
            inner.step()
        loss, each = sight.loss(weighted(base, deltas, c.detach(), masks), 2 * step + 1)
        outer.zero_grad()
        loss.backward()
        outer.step()
        entropies.append(each)
    with torch.no_grad():
        final = kept(logits, uniform, temperature, mask)
    c = started(base, len(tuned), granularity, start)
    optimizer = torch.optim.Adam([c], lr=learning_rate)
    for step in range(steps):
        loss, each = sight.loss(weighted(base, deltas, c, final), 2 * mask_steps + step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        entropies.append(each)
    with torch.no_grad():
        return Found(weighted(base, deltas, c, final), c.detach(), logits, entropies)
