"""How long images take on this machine, measured on a few: through a tower, and from their files to pixels."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mergecli.clip.model import features
from mergecli.clip.pixels import Processing, decoded_alone, micro_batch_size
from mergecli.clip.preprocessing import Normalization, resize_and_crop_of
from mergecli.data.decoding import workers_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mergecli.clip.model import Clip
    from mergecli.data.images import Images

LONG_ENOUGH = 0.5
"""Seconds of a measurement."""
DECODED = 16
"""Images of a task that are decoded to know how long the others take."""


def noise(clip: Clip, images: int) -> Tensor:
    """(B, 3, H, W) uint8 pixels, on which a tower takes as long as on any others."""
    import torch

    _, shape = resize_and_crop_of(clip)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (images, 3, *shape), dtype=torch.uint8, generator=generator)


def repeated(work: Callable[[], object]) -> float:
    """Seconds of the work, a mean of as many times as fit into a moment; the first time does not count, if it is short."""
    began = time.perf_counter()
    work()
    if (first := time.perf_counter() - began) > LONG_ENOUGH:
        return first
    began, times = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < LONG_ENOUGH and times < 100:
        work()
        times += 1
    return passed / times


def forward_seconds(clip: Clip, batch_size: int) -> float:
    """Seconds that an image takes through the tower where it is now, in batches of that size."""
    import torch

    normalize = Normalization(clip)
    size = min(batch_size, micro_batch_size(clip)) if clip.device.type == "cpu" else batch_size
    pixels = noise(clip, size)

    def forward() -> None:
        with torch.inference_mode():
            features(clip, normalize(pixels)).sum().item()  # waits for a device

    return repeated(forward) / size


def gradient_seconds(clip: Clip, batch_size: int) -> float:
    """Seconds that an image takes through the tower and back, with gradients of all its weights."""
    import torch

    normalize = Normalization(clip)
    pixels, parameters = noise(clip, batch_size), list(clip.tower.parameters())
    wanted = [each.requires_grad for each in parameters]

    def there_and_back() -> None:
        with torch.enable_grad():
            features(clip, normalize(pixels)).square().sum().backward()
        clip.model.logit_scale.sum().item()

    for each in parameters:
        each.requires_grad_(True)
    try:
        return repeated(there_and_back) / batch_size
    finally:
        for each, before in zip(parameters, wanted, strict=True):
            each.requires_grad_(before)
            each.grad = None


def decode_seconds(clip: Clip, images: Images, how: Processing) -> float:
    """Seconds that the processes take for an image, from its file to the pixels that the CLIP gets."""
    few: Sequence[int] = range(0, len(images), max(1, len(images) // DECODED))[:DECODED]
    began = time.perf_counter()
    decoded_alone(clip, images, how).read(few)
    return (time.perf_counter() - began) / len(few) / workers_for(len(images), how.workers)
