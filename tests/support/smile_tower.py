"""A small tower whose linear layers SMILE makes routing ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergecli import methods
from mergecli.methods._base import PerTensor
from mergecli.methods._mixture import Installed, Routed
from tests.conftest import Weights
from tests.support.mixture_files import written

LAYERS = ("mlp.fc1", "mlp.fc2", "q_proj")
"""The layers that are upscaled."""


class Tower(nn.Module):
    """Linear layers of the names that are upscaled, and one of another."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q_proj = nn.Linear(12, 20)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(20, 9), "fc2": nn.Linear(9, 6, bias=False)})
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        inner = self.mlp["fc1"](self.q_proj(inputs).tanh()).tanh()
        return self.head(self.norm(self.mlp["fc2"](inner)))


def inputs(images: int = 8) -> Tensor:
    """(images, 7, 12) tokens."""
    return torch.randn(images, 7, 12, generator=torch.Generator().manual_seed(2))


def tuned_towers(tasks: int, base: nn.Module) -> list[Weights]:
    """Weights near the base's, of other directions for each task."""
    generator = torch.Generator().manual_seed(3)
    return [
        {
            name: value + 0.3 * torch.randn(value.shape, generator=generator)
            for name, value in base.state_dict().items()
        }
        for _ in range(tasks)
    ]


def upscaled(tower: nn.Module, tuned: Sequence[Weights], prefix: str = "", **settings: Any) -> Installed:
    """Layers that route, in the tower."""
    method = methods.create("smile", settings)
    assert isinstance(method, Routed)
    assert isinstance(method, PerTensor)
    base = {f"{prefix}{name}": value.clone() for name, value in tower.state_dict().items()}
    file = written(method, base, [{f"{prefix}{k}": v for k, v in model.items()} for model in tuned])
    for name, value in tower.state_dict().items():
        value.copy_(file[f"{prefix}{name}"])
    names = [f"t{number}" for number, _ in enumerate(tuned, 1)]
    return method.install(tower, file.__getitem__, names, "sample", prefix)
