"""A world with matrices in numbered layers, a table of positions, and tensors of every awkward kind."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.conftest import Weights, World
from tests.support.merging import with_models

LAYERED = {
    "embeddings.position_embedding.weight": (6, 8),
    "embeddings.patch.weight": (3, 2, 4, 4),
    "encoder.layers.0.fc.weight": (12, 8),
    "encoder.layers.0.fc.bias": (12,),
    "encoder.layers.1.fc.weight": (8, 12),
    "encoder.layers.1.norm.weight": (9,),
    "encoder.layers.2.out.weight": (9, 9),
    "post_layernorm.weight": (4,),
    "empty": (0, 3),
    "scale": (),
}
MATRICES = ("encoder.layers.0.fc.weight", "encoder.layers.1.fc.weight", "encoder.layers.2.out.weight")
"""The matrices of layers."""
DEPTHS = {
    "embeddings.position_embedding.weight": 0.0, "embeddings.patch.weight": 0.0, "encoder.layers.0.fc.weight": 0.0,
    "encoder.layers.0.fc.bias": 0.0, "encoder.layers.1.fc.weight": 0.5, "encoder.layers.1.norm.weight": 0.5,
    "encoder.layers.2.out.weight": 1.0, "post_layernorm.weight": 1.0, "empty": 0.0, "scale": 0.0,
}  # fmt: skip
"""Each tensor's depth from 0, the first layer, to 1, the last."""


def layered_weights(seed: int, around: Weights | None = None, step: float = 0.1) -> Weights:
    """Random tensors of those shapes and one of whole numbers; near `around` if that is given."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in LAYERED.items()}
    if around is not None:
        weights = {name: around[name] + step * noise for name, noise in weights.items()}
    return {**weights, "steps": torch.arange(4)}


def layered_world(folder: Path, tasks: int = 3, steps: list[float] | None = None) -> World:
    """A world of that many tasks, whose task vectors are as long as `steps` say."""
    base = layered_weights(0)
    lengths = steps or [0.1] * tasks
    tuned = [layered_weights(number, base, step) for number, step in enumerate(lengths, 1)]
    return with_models(World(folder, base, {}), base, *tuned)
