"""A tiny CLIP, three towers near its own, and a task of a few images for each, on disk with a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mergecli.merging.merge import merge
from tests.conftest import Weights
from tests.support.tiny_clip import make_image_task, make_tiny_clip

CLASSES = {"one": ("red", "green", "blue"), "two": ("cat", "dog"), "three": ("a", "b", "c", "d")}
TEMPLATE = "a photo of {}"
VISION = "vision_model."
SHORT: dict[str, Any] = {"batch_size": 3, "steps": 6, "learning_rate": 1e-2}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ada_merging", {}),
    ("ada_merging", {"preprocess": "ties", "granularity": "task"}),
    ("concrete_task_arithmetic", {}),
    ("ada_rank", {"objective": "experts"}),
    ("sy_merge", {}),
    ("concrete_ada_merging", {"mask_steps": 4, "steps": 2}),
    ("concrete_ada_merging", {"mask_steps": 4, "steps": 2, "order": "published", "granularity": "task"}),
]


@dataclass(frozen=True)
class AdaptedWorld:
    """Where everything lies."""

    folder: Path
    recipe: Path

    @property
    def base(self) -> Weights:
        every = load_file(self.folder / "base" / "model.safetensors")
        return {name: value for name, value in sorted(every.items()) if name.startswith(VISION)}

    @property
    def tuned(self) -> list[Weights]:
        return [load_file(self.folder / f"{name}.safetensors") for name in CLASSES]


def make_adapted_world(folder: Path) -> AdaptedWorld:
    """The world in `folder`."""
    make_tiny_clip(folder / "base", seed=5)
    world = AdaptedWorld(folder, folder / "recipe.toml")
    base, lines, tables = world.base, ["schema = 1", 'base = "base"', "[tuned]"], list[str]()
    for number, (name, classes) in enumerate(CLASSES.items()):
        generator = torch.Generator().manual_seed(number)
        tower = {
            key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in base.items()
        }
        save_file(tower, folder / f"{name}.safetensors")
        make_image_task(folder / f"data-{name}", classes, train=20, test=7 + number, seed=number)
        lines.append(f'{name} = "{name}.safetensors"')
        tables += [f"[tasks.{name}]", f'data = "data-{name}"', f'templates = ["{TEMPLATE}"]']
    world.recipe.write_text("\n".join([*lines, *tables]) + "\n")
    return world


def images_of(world: AdaptedWorld, name: str, split: str = "test") -> Sequence[object]:
    """The task's images as PIL gives them."""
    import datasets

    datasets.disable_progress_bars()
    file = world.folder / f"data-{name}" / f"{split}-00000-of-00001.parquet"
    return list(datasets.Dataset.from_parquet(str(file), cache_dir=str(world.folder / "cache"))["image"])


def learn(world: AdaptedWorld, folder: Path, method: str = "ada_merging", **more: Any) -> bytes:
    """The bytes of the file of what was learned."""
    known = ("progress", "coefficients", "trace", "plot", "tensorboard", "changes")
    given = {key: more.pop(key) for key in known if key in more}
    file = folder / "learned.safetensors"
    merge(
        world.recipe, method=method, settings={**SHORT, **more}, output=folder / "merged.safetensors",
        save_coefficients=file, **given,
    )  # fmt: skip
    return file.read_bytes()


def stopping(after: int) -> Callable[[str, int, int], None]:
    """A `progress` that interrupts when so many steps have been done."""

    def progress(description: str, done: int, total: int) -> None:
        if description.startswith("adapting") and done == after:
            raise KeyboardInterrupt

    return progress
