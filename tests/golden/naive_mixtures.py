"""The methods of several towers as their papers write them: all towers as whole models, one token after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.golden.naive import Weights, floats


def emr(base: Weights, tuned: Sequence[Weights]) -> list[Weights]:
    """Huang et al. and FusionBench: every task's tower."""
    unified: Weights = {}
    vectors = [{name: model[name] - value for name, value in floats(base).items()} for model in tuned]
    for name in floats(base):
        sign = 2.0 * (torch.stack([vector[name] for vector in vectors]).sum(0) > 0) - 1
        unified[name] = torch.zeros_like(sign)
        for vector in vectors:
            agrees = vector[name] * sign > 0
            unified[name] = torch.where(
                agrees, torch.maximum(unified[name], vector[name].abs()), unified[name]
            )
        unified[name] *= sign
    towers = []
    for vector in vectors:
        kept = {name: (vector[name] * unified[name] > 0) * unified[name] for name in unified}
        sums = [
            sum(float(each.double().abs().mean()) for each in model.values() if each.numel())
            for model in (vector, kept)
        ]
        rescaler = sums[0] / sums[1] if sums[1] else 0.0
        towers.append({name: base[name] + rescaler * kept[name] for name in kept})
    return towers


def tsv_c(base: Weights, tuned: Sequence[Weights], rank_fraction: float | None) -> list[Weights]:
    """Gargiulo et al.: every task's tower, from full decompositions in float64."""
    towers = []
    for model in tuned:
        tower = {}
        for name, value in floats(base).items():
            delta = (model[name] - value).double()
            if value.dim() == 2 and value.numel() and "position" not in name:
                smaller = min(value.shape)
                k = smaller // len(tuned) if rank_fraction is None else round(rank_fraction * smaller)
                k = max(1, k)
                if k * sum(value.shape) < value.numel():
                    left, values, right = torch.linalg.svd(delta, full_matrices=False)
                    delta = sum(values[j] * torch.outer(left[:, j], right[j]) for j in range(k))  # type: ignore[assignment]
            tower[name] = (value + delta).float()
        towers.append(tower)
    return towers


def smile(
    base: Weights,
    tuned: Sequence[Weights],
    layer: str,
    inputs: Tensor,
    rank: int,
    gate_rank: int,
    experts_per_token: int,
) -> tuple[Tensor, Tensor]:
    """Tang et al.: (B, L, m) outputs of one linear layer for (B, L, n) inputs, and (B, L, T) routing weights."""
    weight, bias = base[f"{layer}.weight"].double(), base[f"{layer}.bias"].double()
    experts = []
    for model in tuned:
        left, values, right = torch.linalg.svd(
            model[f"{layer}.weight"].double() - weight, full_matrices=False
        )
        rows, columns = weight.shape
        factors = min(rank, rows, columns) * (rows + columns)
        whole = factors > columns * (rows + min(gate_rank, rows, columns))  # what takes less room is kept
        k = None if whole else rank
        experts.append((left[:, :k], values[:k], right[:k], model[f"{layer}.bias"].double() - bias))
    outputs = torch.zeros(*inputs.shape[:2], len(weight), dtype=torch.float64)
    routes = torch.zeros(*inputs.shape[:2], len(tuned), dtype=torch.float64)
    for image in range(len(inputs)):
        for token in range(inputs.shape[1]):
            x = inputs[image, token].double()
            chances = torch.stack([(right[:gate_rank] @ x).norm() for _, _, right, _ in experts]).softmax(0)
            chosen = chances.argsort(descending=True)[:experts_per_token].tolist()
            y = weight @ x + bias
            for task in chosen:
                left, values, right, offset = experts[task]
                share = chances[task] / chances[chosen].sum()
                routes[image, token, task] = share
                y = y + share * (left @ (values * (right @ x)) + offset)
            outputs[image, token] = y
    return outputs.float(), routes.float()
