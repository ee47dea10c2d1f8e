"""Drops of water or mud on the lens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mergecli.data.corruptions.edges import PIXEL, distances, edges, padded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Plane = NDArray[np.float64]
    Bytes = NDArray[np.uint8]

WATER = (175, 238, 238)
MUD = (63, 42, 20)
FARTHEST = 20
"""The distance from the edge of a drop, in pixels, from which on its inside looks the same."""

LIGHT = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))
"""The filter that lights the drops from one corner."""


def spatter(
    pixels: Bytes, liquid: tuple[float, float, float, float, float, int], rng: np.random.Generator
) -> Bytes:
    """The image behind drops where blurred normal noise exceeds a threshold: of pale turquoise water, whose light is
    added, or of brown mud, which hides what is behind it.

    The steps and constants are ImageNet-C's; the filters that it takes from OpenCV and scikit-image are written out
    here: see `gaussian_blur`, `water`, `mud`, `edges` and `distances`. Differs: an image without any water stays as
    it is, where ImageNet-C divides by zero.
    """
    import numpy as np

    mean, deviation, blur, threshold, strength, is_mud = liquid
    layer = gaussian_blur(mean + deviation * rng.standard_normal(pixels.shape[:2]), blur)
    layer[layer < threshold] = 0
    if is_mud:
        cover = mud(layer > threshold, strength)[..., None]
        mixed = pixels * (1 - cover) + np.array(MUD) * cover
    else:
        light = water((layer * 255).astype(np.uint8), strength)[..., None]
        mixed = pixels + np.array(WATER) * light
    return mixed.clip(0, 255).astype(np.uint8)


def mud(drops: NDArray[np.bool_], blur: float) -> Plane:
    """(H, W) opacity: the drops with a blurred outline, cut off below 0.8."""
    cover = gaussian_blur(drops.astype(float), blur)
    cover[cover < 0.8] = 0
    return cover


def water(layer: Bytes, opacity: float) -> Plane:
    """(H, W) light from 0 to `opacity`: the depth of the liquid times the light on its relief.

    The relief is the distance to the nearest Canny edge of the layer (thresholds 50 and 150), at most 20, smoothed,
    its histogram equalized, lit by `LIGHT` and smoothed again; each step rounds to bytes as OpenCV does.
    """
    import numpy as np

    far = distances(edges(layer, 50, 150), FARTHEST)
    relief = equalized((_sum_of_nine(far) // (9 * PIXEL)).astype(np.uint8))
    wide = padded(relief.astype(np.int32), "reflect")
    rows, columns = relief.shape
    lit = sum(
        weight * wide[y : y + rows, x : x + columns]
        for y, line in enumerate(LIGHT)
        for x, weight in enumerate(line)
    )
    smooth = (2 * _sum_of_nine(np.clip(lit, 0, 255)) + 9) // 18
    light = layer.astype(float) * smooth
    return light * (opacity / (light.max() or 1))


def equalized(levels: Bytes) -> Bytes:
    """The bytes with their histogram spread over 0 to 255; as OpenCV, the lowest level becomes 0."""
    import numpy as np

    counts = np.bincount(levels.ravel(), minlength=256)
    lowest = counts[counts > 0][0]
    if lowest == levels.size:
        return levels
    table = np.rint((counts.cumsum() - lowest).clip(0) * (255 / (levels.size - lowest)))
    return table.astype(np.uint8)[levels]


def gaussian_blur(plane: Plane, sigma: float) -> Plane:
    """(H, W) the plane blurred by a normal curve cut at 4 sigma, the border repeated; as scikit-image's `gaussian`."""
    import numpy as np

    radius = int(4 * sigma + 0.5)
    curve = [math.exp(-((i / sigma) ** 2) / 2) for i in range(-radius, radius + 1)]
    weights = [value / math.fsum(curve) for value in curve]
    for _ in range(2):  # along the rows, then along the columns, which the transpose turns into rows
        wide = np.pad(plane, ((radius, radius), (0, 0)), "edge")
        rows = plane.shape[0]
        blurred = np.zeros_like(plane)
        for i, weight in enumerate(weights):
            blurred += weight * wide[i : i + rows]
        plane = np.ascontiguousarray(blurred.T)
    return plane


def _sum_of_nine(plane: NDArray[Any]) -> NDArray[Any]:
    """(H, W) int64 sum of every pixel and its eight neighbors, the image mirrored at its border."""
    import numpy as np

    wide = padded(plane.astype(np.int64), "reflect")
    three = wide[:-2] + wide[1:-1] + wide[2:]
    return three[:, :-2] + three[:, 1:-1] + three[:, 2:]
