"""Canny's edges and the distance to them, in whole numbers, as OpenCV finds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]

SLOPE = 13573
"""tan(22.5 degrees) in units of 2^-15."""

PIXEL = 10_000
STRAIGHT, DIAGONAL, KNIGHT = PIXEL, 14_000, 21_969
"""The lengths 1, 1.4 and 2.1969 of a chamfer's steps to (1, 0), (1, 1) and (2, 1) in units of 1e-4 pixels
(Borgefors, "Distance transformations in digital images", 1986, with OpenCV's lengths for a mask of 5 x 5)."""


def edges(levels: NDArray[np.uint8], low: int, high: int) -> Mask:
    """(H, W) Canny's edges: where the Sobel gradient (sum of magnitudes) is highest across the edge and above `high`,
    or above `low` and joined to such a pixel (Canny, "A computational approach to edge detection", 1986).
    """
    import numpy as np

    wide = padded(levels.astype(np.int32), "edge")
    smooth = wide[:-2] + 2 * wide[1:-1] + wide[2:]
    x = smooth[:, 2:] - smooth[:, :-2]
    smooth = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]
    y = smooth[2:] - smooth[:-2]
    across, down = np.abs(x), np.abs(y)
    strength = across + down
    around = padded(strength, "constant")

    def beside(row: int, column: int) -> NDArray[np.int32]:
        """The strength one row and column further."""
        rows, columns = levels.shape
        return around[1 + row : 1 + row + rows, 1 + column : 1 + column + columns]

    flat, steep = (down << 15) < SLOPE * across, (down << 15) > (SLOPE + (1 << 16)) * across
    falling = (x ^ y) < 0
    thin = np.select(
        [flat, steep, falling],
        [
            (strength > beside(0, -1)) & (strength >= beside(0, 1)),
            (strength > beside(-1, 0)) & (strength >= beside(1, 0)),
            (strength > beside(-1, 1)) & (strength > beside(1, -1)),
        ],
        (strength > beside(-1, -1)) & (strength > beside(1, 1)),
    )
    return _grown(thin & (strength > high), thin & (strength > low))


def _grown(seeds: Mask, allowed: Mask) -> Mask:
    """(H, W) the seeds, and the allowed pixels that a chain of allowed neighbors joins to one."""
    import numpy as np

    rows, columns = seeds.shape
    width = columns + 2
    steps = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    left = padded(allowed & ~seeds, "constant").ravel()
    found = padded(seeds, "constant").ravel()
    front = np.flatnonzero(found)
    while front.size:
        near = (front[:, None] + steps).ravel()
        front = np.unique(near[left[near]])
        left[front] = False
        found[front] = True
    return found.reshape(rows + 2, width)[1:-1, 1:-1]


def distances(marks: Mask, farthest: int) -> NDArray[np.int32]:
    """(H, W) the chamfer distance of every pixel to the nearest mark, at most `farthest` pixels, in units of 1e-4.

    First the distance within each column, then the nearest of the columns within reach. The two passes of a chamfer give the
    same, since its distance grows with the distance in the column; but they go pixel by pixel, which is slow in Python.
    """
    import numpy as np

    beyond = farthest + 1
    row = np.arange(marks.shape[0])[:, None]
    above = np.maximum.accumulate(np.where(marks, row, -beyond), axis=0)
    below = np.minimum.accumulate(np.where(marks, row, marks.shape[0] + beyond)[::-1], axis=0)[::-1]
    in_column = np.minimum(row - above, below - row).clip(0, beyond).astype(np.uint8)

    columns = marks.shape[1]
    wide = np.pad(in_column, ((0, 0), (beyond, beyond)), constant_values=beyond)
    nearest = np.full(marks.shape, farthest * PIXEL, np.int32)
    for aside in range(beyond):
        left, right = beyond - aside, beyond + aside
        closer = np.minimum(wide[:, left : left + columns], wide[:, right : right + columns])
        lengths = [_length(aside, down) if down < beyond else farthest * PIXEL for down in range(beyond + 1)]
        np.minimum(nearest, np.array(lengths, np.int32).take(closer), out=nearest)
    return nearest


def _length(aside: int, down: int) -> int:
    """The chamfer distance of two pixels that many columns and rows apart."""
    short, long = sorted((aside, down))
    if long >= 2 * short:
        return KNIGHT * short + STRAIGHT * (long - 2 * short)
    return KNIGHT * (long - short) + DIAGONAL * (2 * short - long)


def padded(plane: NDArray[Any], how: Literal["edge", "reflect", "constant"]) -> NDArray[Any]:
    """(H + 2, W + 2) the plane with a border of one pixel: repeated, mirrored or zero."""
    import numpy as np

    return np.pad(plane, 1, how)
