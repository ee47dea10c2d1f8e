"""More methods as their papers write them: whole models in memory, no cleverness, float32."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mergecli.methods._base import Group
from tests.golden.naive import Weights, flat, floats, unflat


def uniform(name: str, like: Tensor, task: str, seed: int = 0) -> Tensor:
    """The random numbers that the recipe's seed gives for a whole tensor of a task."""
    return Group(name, None, torch.zeros(1, *like.shape), (True,), (task,), seed).uniform(0)


def dare(
    base: Weights, tuned: Sequence[Weights], drop_rate: float, rescale: bool, seed: int = 0
) -> list[Weights]:
    """The thinned models, for another method to merge; tasks are called t1, t2, ..."""
    thinned = []
    for number, model in enumerate(tuned, 1):
        result = dict(model)
        for name, value in floats(base).items():
            kept = uniform(name, value, f"t{number}", seed) >= drop_rate
            delta = torch.where(kept, model[name] - value, 0)
            result[name] = value + (delta / (1 - drop_rate) if rescale else delta)
        thinned.append(result)
    return thinned


def della(
    base: Weights, tuned: Sequence[Weights], scaling_factor: float, drop_rate: float, window: float,
    aggregate: str, elect: bool,
) -> Weights:  # fmt: skip
    """Deep et al., section 3, row by row."""
    result = {}
    for name, value in floats(base).items():
        kept = []
        for number, model in enumerate(tuned, 1):
            delta = model[name] - value
            rows = delta.flatten(1) if delta.dim() > 1 else delta.reshape(1, -1)
            noise = uniform(name, value, f"t{number}").reshape(rows.shape)
            new = torch.zeros_like(rows)
            for row, drawn, out in zip(rows, noise, new, strict=True):
                ranked = sorted(range(len(row)), key=lambda at: -abs(float(row[at])))
                for rank, at in enumerate(ranked):
                    drop = drop_rate - window / 2 + window * rank / len(row)
                    out[at] = row[at] / (1 - drop) if drawn[at] >= drop else 0
            kept.append(new.reshape(value.shape))
        stacked = torch.stack(kept)
        if elect:
            stacked = torch.where(stacked.sign() == stacked.sum(0).sign(), stacked, 0)
        merged = stacked.sum(0)
        if aggregate == "mean":
            merged = merged / (stacked != 0).sum(0).clamp(min=1)
        result[name] = value + scaling_factor * merged
    return result


def breadcrumbs(
    base: Weights, tuned: Sequence[Weights], scaling_factor: float, drop_smallest: float, drop_largest: float
) -> Weights:
    """Davari and Belilovsky: by rank, for entries none of which tie."""
    result = {}
    for name, value in floats(base).items():
        merged = torch.zeros_like(value)
        for model in tuned:
            delta = (model[name] - value).reshape(-1)
            order = delta.abs().argsort()
            below, above = int(drop_smallest * len(delta)), int(drop_largest * len(delta))
            kept = torch.zeros_like(delta)
            middle = order[below : len(delta) - above]
            kept[middle] = delta[middle]
            merged = merged + kept.reshape(value.shape)
        result[name] = value + scaling_factor * merged
    return result


def magmax(base: Weights, tuned: Sequence[Weights], scaling_factor: float) -> Weights:
    result = {}
    for name, value in floats(base).items():
        deltas = torch.stack([model[name] - value for model in reversed(tuned)])
        largest = deltas.abs().argmax(0, keepdim=True)
        result[name] = value + scaling_factor * deltas.gather(0, largest)[0]
    return result


def tall_masks(base: Weights, tuned: Sequence[Weights], mask_threshold: float) -> tuple[Tensor, Tensor]:
    """(T, D) masks and (D,) the summed task vector."""
    deltas = torch.stack([flat(model) - flat(base) for model in tuned])
    summed = deltas.sum(0)
    return deltas.abs() > mask_threshold * (summed - deltas).abs(), summed


def tall_mask(base: Weights, tuned: Sequence[Weights], task: int, mask_threshold: float) -> Weights:
    masks, summed = tall_masks(base, tuned, mask_threshold)
    return unflat(flat(base) + masks[task] * summed, base)


def consensus(
    base: Weights, tuned: Sequence[Weights], scaling_factor: float, agreeing_tasks: int, mask_threshold: float
) -> Weights:
    masks, summed = tall_masks(base, tuned, mask_threshold)
    return unflat(flat(base) + scaling_factor * (masks.sum(0) >= agreeing_tasks) * summed, base)


def pcb(base: Weights, tuned: Sequence[Weights], scaling_factor: float, density: float) -> Weights:
    """Du et al., as their program computes it, on whole task vectors."""
    deltas = torch.stack([flat(model) - flat(base) for model in tuned])  # (T, D)
    count, entries = deltas.shape
    ordered = deltas.abs().sort(dim=1).values
    low = ordered[:, int(entries * 0.0001)].unsqueeze(1)
    high = ordered[:, int(entries * (1 - 0.0001) - 1)].unsqueeze(1)
    magnitude = deltas.abs().clamp(low, high)
    intra = torch.exp(count * ((magnitude - low) / (high - low)) ** 2)
    inter = torch.tanh(deltas * deltas.sum(0))
    score = intra * inter
    ranked = score.sort(dim=1).values
    least = ranked[:, int(entries * (1 - density))].unsqueeze(1)
    weight = (score.clamp(min=least) - least) / (ranked[:, -1:] - least)
    merged = (magnitude * deltas.sign() * weight).sum(0) / weight.sum(0).clamp(min=1e-12)
    return unflat(flat(base) + scaling_factor * merged, base)


def linear(tuned: Sequence[Weights], t: float) -> Weights:
    first, second = tuned
    return {name: (1 - t) * first[name] + t * second[name] for name in floats(first)}


def slerp(tuned: Sequence[Weights], t: float) -> Weights:
    first, second = tuned
    result = {}
    for name in floats(first):
        a, b = first[name].double(), second[name].double()
        cosine = float((a * b).sum() / (a.norm() * b.norm()))
        if not abs(cosine) <= 0.9995:
            result[name] = (1 - t) * a + t * b
        else:
            angle = torch.tensor(cosine, dtype=torch.float64).acos()
            result[name] = (
                torch.sin((1 - t) * angle) / torch.sin(angle) * a
                + torch.sin(t * angle) / torch.sin(angle) * b
            )
    return {name: value.float() for name, value in result.items()}


def karcher(tuned: Sequence[Weights], steps: int) -> Weights:
    """By the exponential and logarithmic maps on the tensors themselves."""
    result = {}
    for name in floats(tuned[0]):
        values = [model[name].double().reshape(-1) for model in tuned]
        radius = sum(value.norm() for value in values) / len(values)
        points = [value / value.norm() for value in values if value.norm() > 0]
        if not points:
            result[name] = tuned[0][name]
            continue
        mean = sum(points) / len(points)
        mean = mean / mean.norm()
        for _ in range(steps):
            tangent = torch.zeros_like(mean)
            for point in points:
                aside = point - (mean @ point) * mean
                if aside.norm() > 1e-12:
                    tangent += torch.atan2(aside.norm(), mean @ point) * aside / aside.norm() / len(points)
            length = tangent.norm()
            if length > 1e-14:
                mean = length.cos() * mean + length.sin() * tangent / length
                mean = mean / mean.norm()
        result[name] = (radius * mean).reshape(tuned[0][name].shape).float()
    return result


def model_stock(base: Weights, tuned: Sequence[Weights]) -> Weights:
    result = {}
    for name, value in floats(base).items():
        deltas = [(model[name] - value).double() for model in tuned]
        angles = [
            torch.acos(((a * b).sum() / (a.norm() * b.norm())).nan_to_num(0).clamp(-1, 1))
            for a, b in itertools.combinations(deltas, 2)
        ]
        cosine = torch.cos(torch.stack(angles).mean()).clamp(min=0)
        t = len(tuned) * cosine / (1 + (len(tuned) - 1) * cosine)
        mean = sum(model[name] for model in tuned) / len(tuned)
        result[name] = (t * mean + (1 - t) * value).float()
    return result


def lines(
    base: Weights, merged: Weights, depths: dict[str, float], first_layer: float, increase: float
) -> Weights:
    return {
        name: value + (first_layer + increase * depths[name]) * (merged[name] - value)
        for name, value in floats(base).items()
    }
