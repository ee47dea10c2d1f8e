"""The CLIP of an adapted world as transformers alone has it, in float64: what learned methods are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergecli.merging.learning.objective import TaskBatches
from tests.methods.reference._adamerging_loop import Sight
from tests.support.adapted_world import CLASSES, TEMPLATE, VISION, AdaptedWorld, images_of

BATCH, SEED = 3, 0
"""Images of a step, and the recipe's seed."""

Batches = Callable[[int], list[tuple[int, Tensor]]]
"""Number of the draw -> the place of each task that is looked at, and its pixels."""


@dataclass(frozen=True)
class ExactClip:
    """The model in float64, the tasks' heads and the pixels of their images."""

    world: AdaptedWorld
    model: Any
    heads: Sequence[Tensor]
    pixels: Mapping[str, Mapping[str, Tensor]]
    """Split -> task -> (N, 3, H, W)."""

    def tower(self) -> Any:
        """A vision tower of one's own, with the base's weights."""
        return copy.deepcopy(self.model.vision_model)

    def classify(self, pooled: Tensor, place: int) -> Tensor:
        """(B, C) logits of a task from (B, D) outputs of a vision tower."""
        image = self.model.visual_projection(pooled)
        return self.model.logit_scale.exp() * (image / image.norm(dim=-1, keepdim=True)) @ self.heads[place].T

    def logits(self, tower: Any) -> Callable[[Tensor, int], Tensor]:
        """(pixels, place of the task) -> (B, C) logits, of a tower."""
        return lambda pixels, place: self.classify(tower(pixels).pooler_output, place)

    def batches(self, tasks: Sequence[str] = tuple(CLASSES), split: str = "test") -> Batches:
        """What is looked at in each step."""
        every = self.pixels[split]

        def batches(draw: int) -> list[tuple[int, Tensor]]:
            rows = {
                name: TaskBatches(0, name, every[name], every[name]).rows(draw, BATCH, SEED) for name in tasks
            }
            return [(place, every[name][rows[name]]) for place, name in enumerate(CLASSES) if name in tasks]

        return batches

    def sight(self, tasks: Sequence[str] = tuple(CLASSES), split: str = "test") -> Sight:
        """What a merged tower is judged by."""

        def classify(weights: Mapping[str, Tensor], pixels: Tensor, place: int) -> Tensor:
            own = {name.removeprefix(VISION): value for name, value in weights.items()}
            pooled = torch.func.functional_call(self.model.vision_model, own, (pixels,)).pooler_output
            return self.classify(pooled, place)

        return Sight(classify, self.batches(tasks, split))


def make_exact_clip(world: AdaptedWorld) -> ExactClip:
    """The world's CLIP."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = world.folder / "base"
    model = CLIPModel.from_pretrained(folder).requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    heads: list[Tensor] = []
    for classes in CLASSES.values():
        tokens = [tokenizer([TEMPLATE.format(name)], return_tensors="pt") for name in classes]
        rows = torch.cat([model.get_text_features(**each).pooler_output for each in tokens])
        heads.append((rows / rows.norm(dim=-1, keepdim=True)).double())
    pixels = {
        split: {
            name: processor(images_of(world, name, split), return_tensors="pt")["pixel_values"].double()
            for name in CLASSES
        }
        for split in ("train", "test")
    }
    return ExactClip(world, model.double(), heads, pixels)
