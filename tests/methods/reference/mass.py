"""MASS image by image, with full decompositions in float64: every matrix of every set of tasks is merged anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.methods.reference._svd import nearest_orthogonal, svd
from tests.methods.reference._weights import Weights, floats


class Seen(NamedTuple):
    """What became of an image."""

    pooled: Tensor
    probabilities: list[float]
    tasks: list[int]


def parts(base: Weights, tuned: Sequence[Weights], name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """U, S and V^T of each task, cut to their share of the rank."""
    k = max(1, min(base[name].shape) // len(tuned))
    full = [svd(model[name].double() - base[name].double()) for model in tuned]
    return [(u[:, :k], s[:k], v[:k]) for u, s, v in full]


def merged(base: Weights, tuned: Sequence[Weights], tasks: Sequence[int]) -> Weights:
    """TSV-M of some of the tasks, of what is kept of each among all of them."""
    result = {}
    for name, value in floats(base).items():
        if value.dim() == 2 and "position" not in name:
            kept = parts(base, tuned, name)
            left = nearest_orthogonal(torch.cat([kept[task][0] for task in tasks], dim=1))
            right = nearest_orthogonal(torch.cat([kept[task][2] for task in tasks]))
            tau = left @ torch.diag(torch.cat([kept[task][1] for task in tasks])) @ right
        else:
            tau = sum(tuned[task][name].double() - value.double() for task in tasks) / len(tasks)
        result[name] = value.double() + tau
    return result


def mass(
    tower: nn.Module,
    prefix: str,
    base: Weights,
    tuned: Sequence[Weights],
    image: Tensor,
    layer: int,
    threshold: float,
    most: int,
) -> Seen:
    """Crisostomi et al., 2025, of one image (C, H, W)."""

    def run(weights: Weights) -> tuple[Tensor, Tensor]:
        tower.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items()})
        given: list[Tensor] = []
        module = tower.get_submodule(f"encoder.layers.{layer}.mlp.fc1")
        handle = module.register_forward_pre_hook(lambda _, tokens: given.append(tokens[0][0, 0]))
        pooled = tower(pixel_values=image[None])[0]
        handle.remove()
        return pooled, given[0]

    _, token = run(merged(base, tuned, range(len(tuned))))
    name = f"{prefix}encoder.layers.{layer}.mlp.fc1.weight"
    apart = torch.stack(
        [torch.linalg.norm(token - right.T @ (right @ token)) for _, _, right in parts(base, tuned, name)]
    )
    if len(tuned) == 1:
        probabilities = [1.0]
    else:
        scores = (apart.mean() - apart) / (apart.std() + 1e-6)
        probabilities = (scores.exp() / scores.exp().sum()).tolist()
    by_chance = sorted(range(len(tuned)), key=lambda task: -probabilities[task])[:most]
    tasks = sorted(task for task in by_chance if probabilities[task] > threshold) or by_chance[:1]
    return Seen(run(merged(base, tuned, tasks))[0], probabilities, tasks)
