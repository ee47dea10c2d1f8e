"""SyMerge: autograd through the merge and every head, and torch's own Adam for both; in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tests.methods.reference._adamerging_loop import deltas_of, weighted
from tests.methods.reference._weights import Weights

Features = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""(weights, pixels) -> (B, D) unit image features."""
Batches = Callable[[int], list[tuple[int, Tensor]]]
"""Number of the round -> the place of each task that is looked at, and its pixels."""


def kept(own: Tensor, expert: Tensor) -> list[int]:
    """Which rows of the merged model's (B, C) logits are learned from: it agrees with the expert, or is no surer."""
    found: list[int] = []
    for number, (one, other) in enumerate(zip(own.softmax(-1), expert.softmax(-1), strict=True)):
        if one.argmax() == other.argmax() or other.max() >= one.max():
            found.append(number)
    return found


def imitation(own: Tensor, expert: Tensor) -> Tensor | None:
    """() the mean of -log p over the classes that the expert predicts; None where no image is learned from."""
    rows = kept(own, expert)
    log = own.log_softmax(-1)
    return -torch.stack([log[row, expert[row].argmax()] for row in rows]).mean() if rows else None


def sy_merge(
    features: Features, batches: Batches, heads: Sequence[Tensor], base: Weights, tuned: Sequence[Weights],
    order: Callable[[int], Sequence[int]], *, steps: int, learning_rate: float, start: float = 0.3,
    sum_tasks: bool = False,
) -> tuple[Weights, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """The merged weights, (T, P) coefficients, and every task's weights and biases.

    Args:
        heads: (C, D) zero-shot heads with the logit scale in them.
        order: the places of the tasks in a round.
    """
    deltas = deltas_of(base, tuned)
    experts = [{name: value.double() for name, value in each.items()} for each in tuned]
    c = torch.full((len(tuned), len(base)), start, dtype=torch.float64, requires_grad=True)
    weights = [head.double().clone().requires_grad_() for head in heads]
    biases = [torch.zeros(len(head), dtype=torch.float64, requires_grad=True) for head in heads]
    optimizer = torch.optim.Adam([c, *weights, *biases], lr=learning_rate)

    def merged() -> Weights:
        return weighted(base, deltas, c.clamp(0, 1))

    def loss(place: int, pixels: Tensor) -> Tensor | None:
        with torch.no_grad():
            wanted = features(experts[place], pixels) @ heads[place].double().T
        own = features(merged(), pixels) @ weights[place].T + biases[place]
        return imitation(own, wanted)

    for number in range(steps):
        seen = dict(batches(number))
        for places in [list(seen)] if sum_tasks else [[place] for place in order(number)]:
            found = [each for each in (loss(place, seen[place]) for place in places) if each is not None]
            if found:
                optimizer.zero_grad()
                torch.stack(found).sum().backward()
                optimizer.step()
    with torch.no_grad():
        return merged(), c.clamp(0, 1), [each.detach() for each in weights], [b.detach() for b in biases]
