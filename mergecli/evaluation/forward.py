"""A CLIP with room for one vision tower at a time, and the logits it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from mergecli.clip.pixels import piece_of
from mergecli.formats.mixture import mixture_of
from mergecli.methods._mixture import Installed, Routing
from mergecli.runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.model import Clip
    from mergecli.evaluation.features import LayerFeatures
    from mergecli.storage.checkpoint import Checkpoint


class Seat:
    """A CLIP with room for one vision tower at a time."""

    def __init__(self, clip: Clip, routing: Routing = "sample") -> None:
        self.clip = clip
        self.routing: Routing = routing
        """How towers that route do so."""
        self.correction: Callable[[Tensor], Tensor] | None = None
        """What changes the image features of the tower and task."""
        self.installed: Installed | None = None
        """The routing layers of the tower that is in."""
        self._taken: tuple[Checkpoint, str] | None = None

    @property
    def keeps_batches_whole(self) -> bool:
        """Whether what is made of an image depends on the others of its batch."""
        return self.installed is not None and self.installed.keeps_batches_whole

    def take(self, checkpoint: Checkpoint, task: str) -> None:
        """Puts a checkpoint's weights in, of a mixture those for the task, unless they are there already."""
        from mergecli.clip.model import set_tower

        if self._taken and self._taken[0] is checkpoint:
            serves_all = self.installed is not None or not checkpoint.is_mixture
            if serves_all or self._taken[1] == task:
                return
        self.release()
        if not checkpoint.is_mixture:
            set_tower(self.clip, checkpoint)
        else:
            mixture = mixture_of(checkpoint)
            if mixture.is_routed:
                set_tower(self.clip, mixture.shared)
                self.installed = mixture.install(self.clip.tower, self.routing)
            else:
                set_tower(self.clip, mixture.of_task(task))
                self.correction = mixture.correction(task, self.clip.device)
        self._taken = checkpoint, task

    def release(self) -> None:
        """Leaves a plain tower, whose weights are no longer of use."""
        if self.installed is not None:
            self.installed.remove()
        self._taken = self.installed = self.correction = None

    def another(self) -> Seat:
        """A seat that shares everything with this one but the tower's weights."""
        self.release()
        model = self.clip.model
        shared = {id(part): part for name, part in model.named_children() if name != "vision_model"}
        return Seat(replace(self.clip, model=copy.deepcopy(model, shared)), self.routing)


class Forward:
    """Logits of a batch, computed in as many pieces as the device needs, or as fit into a processor's cache."""

    def __init__(self, seat: Seat, head: Tensor) -> None:
        self._seat, self._head = seat, head
        self.watch: Callable[[Mapping[str, Tensor], int], None] | None = None
        """Called with the routing weights of every layer, and the number of images, for each piece once all have passed."""
        self._most: int | None = piece_of(seat.clip) if head.device.type == "cpu" else None

    def __call__(self, pixel_values: Tensor, features: LayerFeatures | None, row: int) -> Tensor:
        """(B, C); `row` is the number of the batch's first image."""
        import torch

        while True:
            whole = self._most is None or self._seat.keeps_batches_whole
            count = 1 if whole else -(-len(pixel_values) // (self._most or 1))
            pieces = pixel_values.tensor_split(count)
            try:
                with features.of_images_from(row) if features else nullcontext():
                    found = [self._logits(piece) for piece in pieces]
                if self.watch is not None:
                    for _, routes, images in found:
                        self.watch(routes, images)
                return torch.cat([scores for scores, *_ in found])
            except torch.cuda.OutOfMemoryError as error:
                if len(pieces[0]) == 1 or self._seat.keeps_batches_whole:
                    raise InputError(
                        "the device has too little memory for so many images", "use a smaller `--batch-size`"
                    ) from error
                self._most = (len(pieces[0]) + 1) // 2
                torch.cuda.empty_cache()

    def _logits(self, pixel_values: Tensor) -> tuple[Tensor, Mapping[str, Tensor], int]:
        """(B, C) logits of one piece, its routing weights if they are watched, and B."""
        from mergecli.clip.heads import logits

        scores = logits(self._seat.clip, self._head, pixel_values, self._seat.correction)
        installed = self._seat.installed if self.watch else None
        return scores, installed.routes() if installed else {}, len(pixel_values)
