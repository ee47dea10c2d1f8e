"""ProDistill: the merged and the tasks' own models run whole, autograd through the layer, and torch's own Adam; in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.methods.reference._weights import Weights

PREFIX = "vision_model."


def states(tower: nn.Module, weights: Weights, pixels: Tensor) -> list[Tensor]:
    """What goes into the first layer, and what comes out of each."""
    model: Any = copy.deepcopy(tower).double()
    model.load_state_dict({name.removeprefix(PREFIX): value for name, value in weights.items()})
    found: list[Tensor] = []
    with torch.no_grad():
        hidden = model.pre_layrnorm(model.embeddings(pixels.double()))
        found.append(hidden)
        for layer in model.encoder.layers:
            hidden = layer(hidden, None)
            found.append(hidden)
    return found


def pro_distill(
    tower: nn.Module, base: Weights, tuned: Sequence[Weights], pixels: Sequence[Tensor],
    order: Callable[[str, int, int], Tensor], *, epochs: int, batch: int, learning_rate: float = 0.01,
    start: float = 0.3,
) -> Weights:  # fmt: skip
    """The merged weights.

    Args:
        order: (layer, epoch, images) -> the order in which the images of all tasks, one task after another, are taken.
    """
    base = {name: value.double() for name, value in base.items()}
    deltas = [{name: model[name].double() - base[name] for name in base} for model in tuned]
    merged = {name: base[name] + start * sum(delta[name] for delta in deltas) for name in base}
    wanted = [
        states(tower, {name: base[name] + delta[name] for name in base}, images)
        for delta, images in zip(deltas, pixels, strict=True)
    ]
    layers: Any = copy.deepcopy(tower).double().encoder.layers  # type: ignore[union-attr]
    for number, layer in enumerate(layers):
        prefix = f"{PREFIX}encoder.layers.{number}"
        own = {name: f"{prefix}.{name}" for name, _ in layer.named_parameters()}
        shares = [
            {name: torch.full_like(delta[full], start).requires_grad_() for name, full in own.items()}
            for delta in deltas
        ]
        optimizer = torch.optim.Adam([each for task in shares for each in task.values()], lr=learning_rate)
        given = torch.cat([states(tower, merged, images)[number] for images in pixels])
        targets = torch.cat([each[number + 1] for each in wanted])

        def weights(own: dict[str, str] = own, shares: list[Weights] = shares) -> Weights:
            return {
                name: base[full] + sum(share[name] * delta[full] for share, delta in zip(shares, deltas, strict=True))
                for name, full in own.items()
            }  # fmt: skip

        for epoch in range(epochs):
            for rows in order(prefix, epoch, len(given)).split(batch):
                out = torch.func.functional_call(layer, weights(), (given[rows], None))
                optimizer.zero_grad()
                ((out - targets[rows]) ** 2).sum().backward()
                optimizer.step()
        merged |= {own[name]: value.detach() for name, value in weights().items()}
    return merged
