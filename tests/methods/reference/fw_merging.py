"""FW-Merging, hard: whole weights move towards whole candidates, gradients by autograd; in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._adamerging_loop import Found, Sight, deltas_of
from tests.methods.reference._weights import Weights


def fw_merging(
    sight: Sight, base: Weights, tuned: Sequence[Weights], *, steps: int, start: float = 0.3, gamma: float = 0.03,
    granularity: str = "task",
) -> Found:  # fmt: skip
    deltas = deltas_of(base, tuned)
    first = {name: base[name].double() + start * sum(delta[name] for delta in deltas) for name in base}
    candidates = [{name: model[name].double() for name in base} for model in tuned] + [first]
    now, losses = dict(first), list[list[float]]()
    for k in range(steps):
        weights = {name: value.clone().requires_grad_() for name, value in now.items()}
        loss, each = sight.loss(weights, k)
        loss.backward()
        losses.append(each)
        gradients = {
            name: torch.zeros_like(weights[name]) if weights[name].grad is None else weights[name].grad
            for name in base
        }
        largest = max(float(g.norm()) for g in gradients.values())  # type: ignore[union-attr]
        cosines = {
            name: [
                float((g * other[name]).sum() / (g.norm() * other[name].norm()))  # type: ignore[union-attr]
                if g.norm() > 1e-5 * largest  # type: ignore[union-attr]
                else 0.0
                for other in candidates
            ]
            for name, g in gradients.items()
        }
        sums = [sum(each[place] for each in cosines.values()) for place in range(len(candidates))]
        for name in base:
            scores = sums if granularity == "task" else cosines[name]
            chosen = candidates[scores.index(min(scores))][name]
            now[name] = now[name] + 2 / (k + 2) * gamma * (chosen - now[name])
    return Found(now, torch.empty(0), {}, losses)


def fw_merging_soft(
    sight: Sight,
    base: Weights,
    tuned: Sequence[Weights],
    *,
    rounds: int,
    steps: int,
    rate: float,
    start: float = 0.3,
) -> Found:
    """Whole weights move to learned mixtures of whole models, one coefficient a model and tensor; torch's own Adam."""
    now, losses = {name: base[name].double() for name in base}, list[list[float]]()
    for k in range(rounds):
        shape = (len(tuned), len(base))
        shares = torch.full(shape, start if k == 0 else 1e-8, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([shares], lr=rate)

        def mixed(before: Weights = now, shares: Tensor = shares) -> Weights:
            return {
                name: value
                + sum(shares[i, n] * (model[name].double() - value) for i, model in enumerate(tuned))
                for n, (name, value) in enumerate(before.items())
            }

        for i in range(steps):
            loss, each = sight.loss(mixed(), k * steps + i)
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(each)
        now = {name: value.detach() for name, value in mixed().items()}
    return Found(now, torch.empty(0), {}, losses)
