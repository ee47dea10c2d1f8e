"""AdaMerging's descent as FusionBench describes it: every merged weight is a function of what is learned, and autograd
differentiates it; Adam is torch's own. In float64, so that differences are our rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.methods.reference._weights import Weights


@dataclass(frozen=True)
class Sight:
    """What a merged tower is judged by."""

    classify: Callable[[Mapping[str, Tensor], Tensor, int], Tensor]
    """(weights, pixels, place of the task) -> (B, C) logits."""
    batches: Callable[[int], list[tuple[int, Tensor]]]
    """Number of the draw -> the place of each task that is looked at, and its pixels."""
    experts: Sequence[Weights] = ()
    """The tasks' own models, whose predictions are the labels; none where the loss is the entropy."""

    def of_experts(self, experts: Sequence[Weights]) -> Sight:
        """The same with the loss of SyMerge."""
        return replace(self, experts=[{n: v.double() for n, v in each.items()} for each in experts])

    def loss(self, weights: Mapping[str, Tensor], draw: int) -> tuple[Tensor, list[float]]:
        """() the sum of the losses, and each."""
        each: list[Tensor] = []
        for place, pixels in self.batches(draw):
            chances = self.classify(weights, pixels, place).softmax(-1)
            if self.experts:
                each.append(self._imitation(chances, pixels, place))
                continue
            each.append((-chances * torch.log(chances + 1e-8)).sum(-1).mean())
        return torch.stack(each).sum(), torch.stack(each).tolist()

    def _imitation(self, chances: Tensor, pixels: Tensor, place: int) -> Tensor:
        """() the mean of -log p over the expert's classes, image by image, without those where the merged model differs
        and is surer."""
        with torch.no_grad():
            wanted = self.classify(self.experts[place], pixels, place).softmax(-1)
        kept = []
        for own, other in zip(chances, wanted, strict=True):
            if own.argmax() == other.argmax() or other.max() >= own.max():
                kept.append(-own[other.argmax()].log())
        return torch.stack(kept).mean() if kept else chances.sum() * 0


@dataclass(frozen=True)
class Found:
    """What was learned, what it merges to, and the entropies of each step."""

    merged: Weights
    coefficients: Tensor
    logits: Weights
    entropies: list[list[float]]


def deltas_of(base: Weights, tuned: Sequence[Weights]) -> list[Weights]:
    return [{name: model[name].double() - base[name].double() for name in base} for model in tuned]


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
