"""ESM++ of whole models from what goes into every layer, with full decompositions in float64, image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.methods.reference._svd import svd
from tests.methods.reference._weights import Weights
from tests.methods.reference.esm import esm


class Routing(NamedTuple):
    """The merged tower, and of each task the changes of its weights and the prototypes of their inputs."""

    merged: Weights
    changes: list[Weights]
    prototypes: list[Weights]


def esm_plus_plus(
    base: Weights, tuned: Sequence[Weights], inputs: Sequence[Mapping[str, Tensor]], rank: int
) -> Routing:
    """Li et al., 2026: `inputs` are the (rows, I) inputs of each task's layers, by the names of their weights."""
    merged = esm(base, tuned, inputs, 1.0, fuse=True)
    changes: list[Weights] = [{} for _ in tuned]
    prototypes: list[Weights] = [{} for _ in tuned]
    for name in inputs[0]:
        if name.endswith("q_proj.weight"):
            names = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        elif name.endswith("fc1.weight"):
            names = [name]
        else:
            continue
        for task, (model, own) in enumerate(zip(tuned, inputs, strict=True)):
            delta = torch.cat([model[each].double() - merged[each].double() for each in names])
            _, _, right = svd(own[name] @ delta.T)
            directions = right[: min(rank, *delta.shape)].T
            change = directions @ (directions.T @ delta)
            for each, part in zip(names, change.chunk(len(names)), strict=True):
                changes[task][each] = part
                mean = own[name].mean(0)
                prototypes[task][each] = mean / mean.norm()
    return Routing(merged, changes, prototypes)


def run(tower: nn.Module, known: Routing, images: Tensor, prefix: str, *, batch: bool) -> Tensor:
    """(B, D) pooled outputs of a float64 tower: each image by itself, or each position for all images of the batch."""
    tower.load_state_dict({name.removeprefix(prefix): value.double() for name, value in known.merged.items()})

    def hook(name: str) -> Any:
        def add(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            del module
            result = output.clone()
            parts = given[0].transpose(0, 1) if batch else given[0]
            for place, part in enumerate(parts):
                mean = part.mean(0)
                likeness = [float(mean @ own[name]) for own in known.prototypes]
                extra = part @ known.changes[likeness.index(max(likeness))][name].T
                if batch:
                    result[:, place] += extra
                else:
                    result[place] += extra
            return result

        return add

    handles = [
        module.register_forward_hook(hook(f"{prefix}{path}.weight"))
        for path, module in tower.named_modules()
        if f"{prefix}{path}.weight" in known.changes[0]
    ]
    found = tower(pixel_values=images)
    for handle in handles:
        handle.remove()
    return found
