"""A task's images as a tower gets them, batch after batch: from the cache, or decoded now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from mergecli import caching, interrupts
from mergecli.clip.pixels import Processing, spans
from mergecli.clip.processing import Normalisation

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.images import Images
    from mergecli.clip.model import Clip

DECODED = 256
"""Images that are decoded at a time, or about so many, where they are not in the cache."""


def batches(clip: Clip, images: Images, size: int) -> Iterator[Tensor]:
    """(B, 3, H, W) float32 batches of `size` images, in order, where the CLIP is.

    Raises:
        InputError: an image cannot be read.
    """
    normalised = Normalisation(clip)
    how = Processing(max_size=caching.allowed_size())
    with closing(spans(clip, images, how, size * max(DECODED // size, 1), 0)) as parts:
        for pixels in parts:
            for start in range(0, len(pixels), size):
                interrupts.check()
                yield normalised(pixels.batch(start, min(start + size, len(pixels))))
