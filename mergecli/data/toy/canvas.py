"""Painting on a 32 x 32 canvas with numpy alone: distances to strokes and outlines, patterns, noise and blur."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergecli.data.toy.glyphs import Points

SIDE = 32
Plane = NDArray[np.floating[Any]]
"""(SIDE, SIDE) values, or (SIDE, SIDE, 3) colors in [0, 1]."""

_AXIS = ((np.arange(SIDE, dtype=np.float32) + 0.5) / (SIDE / 2)) - 1
X, Y = (plane.astype(np.float32) for plane in np.meshgrid(_AXIS, _AXIS))
"""(SIDE, SIDE) coordinates of the pixels' centers, in (-1, 1)."""


def segments(lines: Sequence[Points], closed: bool = False) -> NDArray[np.floating[Any]]:
    """(S, 4) start and end of every piece of the polylines."""
    ends = [np.concatenate([line[1:], line[:1]]) if closed else line[1:] for line in lines]
    starts = [line if closed else line[:-1] for line in lines]
    return np.concatenate([np.concatenate(starts), np.concatenate(ends)], 1)


def distance(pieces: NDArray[np.floating[Any]]) -> Plane:
    """(SIDE, SIDE) distance of each pixel from the nearest of the (S, 4) segments."""
    x, y, end_x, end_y = pieces.T[:, :, None, None]
    across, down = end_x - x, end_y - y  # (S, 1, 1)
    from_x, from_y = X - x, Y - y  # (S, SIDE, SIDE)
    along = (from_x * across + from_y * down) / (across * across + down * down + 1e-9)
    np.clip(along, 0, 1, out=along)
    from_x -= along * across
    from_y -= along * down
    from_x *= from_x
    from_y *= from_y
    from_x += from_y
    return np.sqrt(from_x.min(0))


def signed_distance(outline: Points) -> Plane:
    """(SIDE, SIDE) distance from a closed outline, negative inside it."""
    pieces = segments([outline], closed=True)
    x, y, end_x, end_y = pieces.T[:, :, None, None]
    rise = end_y - y
    slope = (end_x - x) / np.where(np.abs(rise) < 1e-6, 1e-6, rise)
    crossed = ((y > Y) != (end_y > Y)) & (slope * (Y - y) + x > X)
    inside = np.logical_xor.reduce(crossed, axis=0)
    return np.where(inside, -1, 1) * distance(pieces)


def coverage(depth: Plane) -> Plane:
    """(SIDE, SIDE) share of each pixel that lies inside, from a signed distance; edges are one pixel soft."""
    return np.clip(0.5 - depth * (SIDE / 2), 0, 1)


def flat(color: NDArray[np.floating[Any]]) -> Plane:
    """(SIDE, SIDE, 3) canvas of one color."""
    return np.broadcast_to(color, (SIDE, SIDE, 3)).astype(np.float32)


def paint(canvas: Plane, cover: Plane, color: NDArray[np.floating[Any]]) -> Plane:
    """(SIDE, SIDE, 3) canvas with a color (or another canvas) laid over it where `cover` is 1."""
    return canvas + cover[..., None] * (color - canvas)


def place(
    points: Points,
    x: float,
    y: float,
    size: float,
    turn: float = 0.0,
    slant: float = 0.0,
) -> Points:
    """The points scaled by `size`, slanted, turned clockwise by `turn` radians, and moved to (x, y)."""
    c, s = np.cos(turn), np.sin(turn)
    matrix = size * np.array([[c, s], [-s - slant * c, c - slant * s]], np.float32)
    return points @ matrix.astype(np.float32) + np.array([x, y], np.float32)


def _wave(x: Plane) -> Plane:
    """Zero to one and back, in straight lines, once in every unit."""
    return np.abs(2 * (x - np.floor(x)) - 1)


def pattern(name: str, period: float, turn: float, x: float, y: float) -> Plane:
    """(SIDE, SIDE) cover of a pattern: `period` pixels, turned by `turn` radians, moved by (x, y) periods."""
    c, s = np.cos(turn, dtype=np.float32), np.sin(turn, dtype=np.float32)
    scale = SIDE / 2 / period
    u = (X * c + Y * s) * scale + x
    v = (Y * c - X * s) * scale + y
    soft = period / 2
    if name == "stripes":
        return np.clip(0.5 + soft * (_wave(u) - 0.5), 0, 1)
    if name == "checks":
        sign = (_wave(u / 2 + 0.25) - 0.5) * (_wave(v / 2 + 0.25) - 0.5) * 8
        return np.clip(0.5 + soft * sign, 0, 1)
    if name == "dots":
        reach = np.sqrt((u - np.round(u)) ** 2 + (v - np.round(v)) ** 2)
        return np.clip(0.5 + 2 * soft * (0.32 - reach), 0, 1)
    if name == "grid":
        return np.clip(0.5 + soft * (np.maximum(_wave(u), _wave(v)) - 0.72), 0, 1)
    if name == "waves":
        return np.clip(0.5 + soft * (_wave(u + 0.3 * np.sin(2 * np.pi * v / 2)) - 0.5), 0, 1)
    if name == "zigzag":
        return np.clip(0.5 + soft * (_wave(u + 1.2 * _wave(v / 2)) - 0.5), 0, 1)
    if name == "bricks":
        row = np.floor(v)
        joint = _wave(u / 2 + 0.5 * (row % 2))
        return np.clip(0.5 + soft * (0.75 - np.maximum(_wave(v), 2 * joint - 1.05)), 0, 1)
    if name == "rings":
        reach = np.sqrt((X - 0.5 * (x - 0.5)) ** 2 + (Y - 0.5 * (y - 0.5)) ** 2) * scale
        return np.clip(0.5 + soft * (_wave(reach + x) - 0.5), 0, 1)
    raise ValueError(f"no pattern `{name}`")


PATTERNS = ("stripes", "checks", "dots", "grid", "waves", "zigzag", "bricks", "rings")


def blur(canvas: Plane, radius: float) -> Plane:
    """The canvas blurred: three-tap averages down and across, as often as `radius` says (a fraction counts in part)."""
    while radius > 0:
        side = min(radius, 1.0) / 3
        padded = np.pad(canvas, ((1, 1), (0, 0), (0, 0)), mode="edge")
        canvas = (1 - 2 * side) * canvas + side * (padded[:-2] + padded[2:])
        padded = np.pad(canvas, ((0, 0), (1, 1), (0, 0)), mode="edge")
        canvas = (1 - 2 * side) * canvas + side * (padded[:, :-2] + padded[:, 2:])
        radius -= 1
    return canvas
