"""The effects of the corruptions on pixels; every effect maps (H, W, 3) uint8 to the same shape.

Values are truncated to bytes, not rounded, as in ImageNet-C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mergecli.data.corruptions.spatter import spatter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    Rng = np.random.Generator


def contrast(pixels: Pixels, factor: float, _: Rng) -> Pixels:
    """Every channel drawn towards its mean over the image: `mean + factor * (x - mean)`."""
    import numpy as np
    from PIL import Image

    means = (pixels.sum(axis=0, dtype=np.int64).sum(axis=0) / (pixels.shape[0] * pixels.shape[1])).tolist()
    table = [int(mean + factor * (level - mean)) for mean in means for level in range(256)]
    return np.asarray(Image.fromarray(pixels).point(table))


def gaussian_noise(pixels: Pixels, sigma: float, rng: Rng) -> Pixels:
    """Independent normal noise on every value, of standard deviation `255 * sigma`."""
    import numpy as np

    noisy = rng.standard_normal(pixels.shape, np.float32)
    noisy *= np.float32(255 * sigma)
    noisy += pixels
    return noisy.clip(0, 255, out=noisy).astype(np.uint8)


def impulse_noise(pixels: Pixels, share: float, rng: Rng) -> Pixels:
    """A share of the values, each channel by itself, made black or white with equal odds (salt and pepper)."""
    import numpy as np

    drawn = rng.random(pixels.shape, np.float32)
    return np.where(drawn < share / 2, 0, np.where(drawn < share, 255, pixels)).astype(np.uint8)


def jpeg_compression(pixels: Pixels, quality: int, _: Rng) -> Pixels:
    """The image written by Pillow as JPEG of that quality, with color at half resolution, and read again."""
    from io import BytesIO

    import numpy as np
    from PIL import Image

    stored = BytesIO()
    Image.fromarray(pixels).save(stored, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(stored) as image:
        return np.asarray(image)


def pixelate(pixels: Pixels, share: float, _: Rng) -> Pixels:
    """The image shrunk to that share of each side and enlarged again, both with Pillow's box filter."""
    import numpy as np
    from PIL import Image

    rows, columns, _channels = pixels.shape
    small = (max(1, int(columns * share)), max(1, int(rows * share)))
    image = Image.fromarray(pixels).resize(small, Image.Resampling.BOX)
    return np.asarray(image.resize((columns, rows), Image.Resampling.BOX))


def motion_blur(pixels: Pixels, blur: tuple[int, float], rng: Rng) -> Pixels:
    """The image blurred along a line at an angle between -45 and 45 degrees; see `streaked`."""
    radius, sigma = blur
    return streaked(pixels, radius, sigma, rng.uniform(-45, 45))


def streaked(pixels: Pixels, radius: int, sigma: float, degrees: float) -> Pixels:
    """Each pixel becomes the mean of the `2 * radius + 1` that follow it on a line, weighted by half a normal curve.

    Pixel `i` on the line, from 0 on, is `(i cos, i sin)` to the right and below, each rounded to a whole pixel, and has
    the weight `exp(-i^2 / (2 sigma^2))`. Beyond the border the nearest pixel counts. That is ImageMagick's motion blur,
    which ImageNet-C calls through Wand: the sum is rounded to 16 bits, and then truncated to a byte.

    Differs: weights are rounded to multiples of 2^-22, so that sums of whole numbers replace sums of floats and are the
    same in every order and on every machine. Against ImageMagick 6.9 one value in 100,000 changes, by 1.
    """
    import numpy as np

    reach = 2 * radius
    curve = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(reach + 1)]
    weights = [round(2**22 * value / sum(curve)) for value in curve]
    weights[0] += 2**22 - sum(weights)  # else a plain area would change its level
    across, down = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    taps: dict[tuple[int, int], int] = {}  # several steps may fall on one pixel
    for i, weight in enumerate(weights):
        offset = math.ceil(i * down - 0.5), math.ceil(i * across - 0.5)  # ImageMagick rounds halves down
        taps[offset] = taps.get(offset, 0) + weight

    rows, columns, _ = pixels.shape
    wide = np.pad(pixels.astype(np.int32), ((reach, reach), (reach, reach), (0, 0)), "edge")
    # A byte b has the 16-bit value 257 b. To round to 16 bits and then truncate to a byte is to truncate once,
    # after half a 16-bit step was added. 255 * 2^22 and that half fit into an int32.
    half_of_16_bits = 2**22 // (2 * 257)
    total = np.full(pixels.shape, half_of_16_bits, np.int32)
    for (y, x), weight in taps.items():
        total += weight * wide[reach + y : reach + y + rows, reach + x : reach + x + columns]
    return (total >> 22).astype(np.uint8)


EFFECTS: dict[str, Callable[[Pixels, Any, Rng], Pixels]] = {
    "contrast": contrast,
    "gaussian_noise": gaussian_noise,
    "impulse_noise": impulse_noise,
    "jpeg_compression": jpeg_compression,
    "motion_blur": motion_blur,
    "pixelate": pixelate,
    "spatter": spatter,
}
