"""A CLIP's image processor in two parts: resizing and cropping of the image, and normalization of its pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergecli.clip.processor import framing_of

if TYPE_CHECKING:
    from torch import Tensor

    from mergecli.clip.model import Clip
    from mergecli.data.decoding import ResizeAndCrop


def resize_and_crop_of(clip: Clip) -> tuple[ResizeAndCrop, tuple[int, int]]:
    """What the CLIP's processor does before it rescales, and the height and width that come out.

    Raises:
        InputError: its processor does something else, or gives images of several sizes.
    """
    return framing_of(clip.processor, clip.path)


class Normalization:
    """(B, 3, H, W) uint8 -> float32 on the CLIP's device: what its processor makes of resized and cropped images, bit
    by bit.

    A processor of transformers computes on the host, partly in float64. `ImageProcessor.levels` does as it does, for each of
    the 256 bytes. Where plain arithmetic on the device gives just these numbers, which is the usual case, it is used, since
    it is faster than a look-up; else the table is.
    """

    def __init__(self, clip: Clip) -> None:
        import torch

        known = clip.processor
        self._table: Tensor = torch.from_numpy(known.levels())[:, None].to(clip.device)  # (3, 1, 256)
        scale = 1 / known.rescale_factor if known.do_rescale else 1.0
        mean, std = (known.image_mean, known.image_std) if known.do_normalize else ((0.0,) * 3, (1.0,) * 3)
        # a divisor on the device: by a number, a GPU multiplies with the reciprocal, which rounds otherwise
        self._scale = torch.tensor(scale, device=clip.device)
        self._mean = torch.tensor(mean, device=clip.device).view(3, 1, 1)
        self._std = torch.tensor(std, device=clip.device).view(3, 1, 1)
        every = torch.arange(256, dtype=torch.uint8, device=clip.device).expand(1, 3, 1, 256)
        self._exact = torch.equal(self._computed(every)[0], self._table)

    def __call__(self, pixels: Tensor) -> Tensor:
        import torch

        pixels = pixels.to(self._table.device, non_blocking=True)
        if self._exact:
            return self._computed(pixels)
        return torch.stack([self._table[each, 0][pixels[:, each].int()] for each in range(3)], dim=1)

    def _computed(self, pixels: Tensor) -> Tensor:
        return pixels.float().div_(self._scale).sub_(self._mean).div_(self._std)
