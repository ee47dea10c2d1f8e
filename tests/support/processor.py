"""What a CLIP's own image processor makes of images, against which ours is held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from mergecli.clip.model import Clip


def pixel_values(clip: Clip, images: Sequence[Image]) -> Tensor:
    """(B, 3, H, W) float32: the images resized, cropped and normalized as the checkpoint's own config says."""
    return clip.processor(images=list(images), return_tensors="pt")["pixel_values"].to(torch.float32)
