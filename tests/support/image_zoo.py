"""A tiny zoo with images: a CLIP, three towers made of it, one of them kept as a task vector, and their tasks."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecli.clip.model import Clip, load_clip
from mergecli.data.images import load_images
from mergecli.data.tasks import TaskTable, find
from mergecli.merging.merge import merge
from mergecli.recipe.schema import Recipe
from mergecli.storage.sources import parse_source
from tests.support.processor import pixel_values
from tests.support.tiny_clip import make_image_task, make_tiny_clip

TEMPLATES = ("a {} picture", "something {}")
CLASSES = {"a": ("red", "green", "blue"), "b": ("cold", "warm"), "c": ("one", "two", "three", "four")}


FEW = {"examples": 20, "batch_size": 7}
"""Settings of methods that measure: fewer images than there are, and a last batch that is not full."""


@dataclass(frozen=True)
class Zoo:
    """Where it lies, its recipe, and the weights of its towers."""

    folder: Path
    recipe: Recipe
    base: Mapping[str, Tensor]
    tuned: Mapping[str, dict[str, Tensor]]

    def clip(self) -> Clip:
        """The CLIP, as it was saved, to be changed at will."""
        loaded = _load(self.folder / "clip")
        return dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))

    def pixels(self, task: str, examples: int, *, shuffle: bool) -> Tensor:
        """(B, 3, H, W) the training images of a task that a method looks at."""
        images = load_images(find(task, self.recipe), "train")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.recipe.seed))
        rows = order.tolist() if shuffle else range(len(images))
        return pixel_values(_load(self.folder / "clip"), [images[row][0] for row in list(rows)[:examples]])


@functools.cache
def _load(folder: Path) -> Clip:
    return load_clip(folder)


def make_zoo(folder: Path) -> Zoo:
    """The zoo in `folder`, with a recipe file `zoo.toml`."""
    make_tiny_clip(folder / "clip")
    whole = load_file(folder / "clip" / "model.safetensors")
    base = {name: value for name, value in whole.items() if name.startswith("vision_model.")}
    tuned: dict[str, dict[str, Tensor]] = {}
    lines = ['base = "clip"', "[tuned]"]
    for number, (task, classes) in enumerate(CLASSES.items(), 1):
        generator = torch.Generator().manual_seed(number)
        tuned[task] = {
            name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in base.items()
        }
        kept = tuned[task]
        if task == "b":
            kept = {name: value - base[name] for name, value in kept.items()}
            tuned[task] = {name: value + base[name] for name, value in kept.items()}
        about = {"kind": "task vector"} if task == "b" else {}
        save_file(kept, folder / f"{task}.safetensors", about)
        make_image_task(folder / "images" / task, classes, train=24 + 2 * number, test=4, seed=number)
        lines.append(f'{task} = "{task}.safetensors"')
    for task in CLASSES:
        templates = ", ".join(f'"{each}"' for each in TEMPLATES)
        lines += [f"[tasks.{task}]", f'data = "images/{task}"', f"templates = [{templates}]"]
    (folder / "zoo.toml").write_text("\n".join(lines) + "\n")
    source = {task: parse_source(str(folder / f"{task}.safetensors"), Path()) for task in CLASSES}
    tables = {
        task: TaskTable(data=parse_source(str(folder / "images" / task), Path()), templates=TEMPLATES)
        for task in CLASSES
    }
    recipe = Recipe(
        base=parse_source(str(folder / "clip"), Path()), tuned=source, tasks=tables, method="average"
    )
    return Zoo(folder, recipe, base, tuned)


def measured_merge(
    zoo: Zoo, method: str, statistics: Path | None = None, **settings: Any
) -> dict[str, Tensor]:
    """The merge by a method that measures first, loaded; what it measured is kept in the folder `statistics`."""
    output = zoo.folder / "measured.safetensors"
    merge(zoo.recipe, method=method, settings={**FEW, **settings}, output=output, statistics=statistics)
    return load_file(output)
