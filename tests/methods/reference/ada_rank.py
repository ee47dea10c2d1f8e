"""AdaRank: autograd through full decompositions with a straight-through mask, and torch's own Adam; in float64."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._adamerging_loop import Found, Sight
from tests.methods.reference._weights import Weights


def stacked(weights: Weights) -> Weights:
    """Queries, keys and values of a layer as one matrix."""
    found: Weights = {}
    for name, value in weights.items():
        if re.search(r"[qkv]_proj[.]weight", name):
            if "q_proj" in name:
                parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                found[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        else:
            found[name] = value
    return found


def apart(weights: Weights) -> Weights:
    found: Weights = {}
    for name, value in weights.items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("qkv_proj", f"{part}_proj")] = rows
        else:
            found[name] = value
    return found


def ada_rank(
    sight: Sight, base: Weights, tuned: Sequence[Weights], *, steps: int, learning_rate: float, start: float = 0.3,
    ratio: float = 1.0, center: str = "base", temperature: float = 10.0,
) -> Found:  # fmt: skip
    models = [{name: value.double() for name, value in stacked(each).items()} for each in (base, *tuned)]
    middle, fine = models[0], models[1:]
    if center == "mean":
        middle = {name: sum(model[name] for model in fine) / len(fine) for name in middle}  # type: ignore[misc]
    names = list(middle)
    c = torch.full((len(fine), len(names)), start, dtype=torch.float64, requires_grad=True)
    logits: dict[str, Tensor] = {}
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for name in names:
        if middle[name].dim() == 2 and ".layers." in name:
            parts[name] = [
                torch.linalg.svd(model[name] - middle[name], full_matrices=False) for model in fine
            ]
            size = len(parts[name][0][1])
            row = torch.full((len(fine), size), 0.1, dtype=torch.float64)
            row[:, int(size * ratio) :] = -0.1
            logits[name] = row.requires_grad_()

    def merged() -> Weights:
        found: Weights = {}
        for column, name in enumerate(names):
            found[name] = middle[name].clone()
            for task, model in enumerate(fine):
                if name in logits:
                    soft = (logits[name][task] / temperature).sigmoid()
                    mask = (soft > 0.5).double() + soft - soft.detach()
                    left, values, right = parts[name][task]
                    found[name] = found[name] + c[task, column] * left @ torch.diag(mask * values) @ right
                else:
                    found[name] = found[name] + c[task, column] * (model[name] - middle[name])
        return apart(found)

    optimizer = torch.optim.Adam([c, *logits.values()], lr=learning_rate)
    entropies: list[list[float]] = []
    for step in range(steps):
        loss, each = sight.loss(merged(), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        entropies.append(each)
    with torch.no_grad():
        return Found(
            merged(), c.detach(), {name: (each > 0).double() for name, each in logits.items()}, entropies
        )
