"""What every method's test does: merge a world on disk and load the result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecli.merging.merge import merge
from tests.conftest import World


def merged(world: World, method: str, tasks: list[str] | None = None, **settings: Any) -> dict[str, Tensor]:
    """The streamed merge of the world's models (or of those named), loaded."""
    chosen: Mapping[str, Path] = {name: world.files[name] for name in tasks or world.files}
    output = world.folder / "merged.safetensors"
    merge(chosen, base=world.base_file, method=method, settings=settings, output=output)
    return load_file(output)


def with_models(world: World, base: dict[str, Tensor], *tuned: dict[str, Tensor]) -> World:
    """A world in the same folder with these models in place of its own."""
    other = World(world.folder, base, {f"t{i}": model for i, model in enumerate(tuned, 1)})
    save_file(base, other.base_file)
    for name, file in other.files.items():
        save_file(other.tuned[name], file)
    return other


def with_integers(weights: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """What a reference merged, and the base's tensor of whole numbers, which no method changes."""
    return {**weights, "steps": world.base["steps"]}


def same_bytes(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """The same values, bit by bit."""
    assert sorted(got) == sorted(want)
    for name, value in want.items():
        assert got[name].view(-1).view(torch.uint8).equal(value.view(-1).view(torch.uint8)), name
