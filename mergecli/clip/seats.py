"""A CLIP with room for one vision tower at a time, and the logits it gives."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from mergecli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.checkpoint import Checkpoint
    from mergecli.clip.features import LayerFeatures
    from mergecli.clip.model import Clip

PIECE = 6 << 20
"""Bytes of activations that a processor works on at a time: on ViT-B/32 a sixth more images a second than 128 at once."""


class Seat:
    """A CLIP with room for one vision tower at a time."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._taken: Checkpoint | None = None

    def take(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint's weights in, unless they are there already."""
        from mergecli.clip.model import set_tower

        if checkpoint is not self._taken:
            self._taken = None
            set_tower(self.clip, checkpoint)
            self._taken = checkpoint

    def another(self) -> Seat:
        """A seat that shares everything with this one but the tower's weights."""
        model = self.clip.model
        shared = {id(part): part for name, part in model.named_children() if name != "vision_model"}
        return Seat(replace(self.clip, model=copy.deepcopy(model, shared)))


class Forward:
    """Logits of a batch, computed in as many pieces as the device needs, or as fit into a processor's cache."""

    def __init__(self, clip: Clip, head: Tensor) -> None:
        self._clip, self._head = clip, head
        self._most: int | None = _piece(clip) if head.device.type == "cpu" else None

    def __call__(self, pixel_values: Tensor, features: LayerFeatures | None, row: int) -> Tensor:
        """(B, C); `row` is the number of the batch's first image."""
        import torch

        from mergecli.clip.heads import logits

        while True:
            count = -(-len(pixel_values) // (self._most or len(pixel_values)))
            pieces = pixel_values.tensor_split(count)
            try:
                with features.of_images_from(row) if features else nullcontext():
                    return torch.cat([logits(self._clip, self._head, piece) for piece in pieces])
            except torch.cuda.OutOfMemoryError as error:
                if len(pieces[0]) == 1:
                    raise InputError("the device has too little memory for one image") from error
                self._most = (len(pieces[0]) + 1) // 2
                torch.cuda.empty_cache()


def _piece(clip: Clip) -> int:
    """How many images' widest activations take about `PIECE` bytes."""
    config = clip.model.config.vision_config
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    return max(1, PIECE // (4 * tokens * max(config.intermediate_size, 1)))
