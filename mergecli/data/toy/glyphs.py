"""Figures as points: a stroke font for digits and letters, outlines of shapes, arrows and faces, all in [-1, 1], y down."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.floating[Any]]
"""(N, 2) corners, x then y."""

DIGITS: dict[str, str] = {
    "zero": "10 30 41 45 36 16 05 01 10",
    "one": "11 20 26|16 36",
    "two": "01 10 30 41 42 06 46",
    "three": "00 40 22 32 43 45 36 16 05",
    "four": "36 30 04 44",
    "five": "40 00 02 32 43 45 36 06",
    "six": "40 20 03 05 16 36 45 44 33 13 04",
    "seven": "00 40 16",
    "eight": "10 30 41 42 33 13 02 01 10|13 04 05 16 36 45 44 33",
    "nine": "06 26 43 41 30 10 01 02 13 33 42",
}
"""Strokes on a grid five wide and seven high: `xy` corners, `|` lifts the pen."""

LETTERS: dict[str, str] = {
    "a": "06 20 46|14 34",
    "b": "00 06 36 45 44 33 03|33 42 41 30 00",
    "c": "41 30 10 01 05 16 36 45",
    "d": "00 06 26 44 42 20 00",
    "e": "40 00 06 46|03 33",
    "f": "40 00 06|03 33",
    "g": "41 30 10 01 05 16 36 45 43 23",
    "h": "00 06|40 46|03 43",
    "i": "10 30|20 26|16 36",
    "j": "40 45 36 16 05 04",
    "k": "00 06|40 03 46",
    "l": "00 06 46",
    "m": "06 00 23 40 46",
    "n": "06 00 46 40",
    "o": "10 30 41 45 36 16 05 01 10",
    "p": "06 00 30 41 42 33 03",
    "q": "10 30 41 45 36 16 05 01 10|34 46",
    "r": "06 00 30 41 42 33 03|23 46",
    "s": "41 30 10 01 02 13 33 44 45 36 16 05",
    "t": "00 40|20 26",
    "u": "00 05 16 36 45 40",
    "v": "00 26 40",
    "w": "00 16 23 36 40",
    "x": "00 46|40 06",
    "y": "00 23 40|23 26",
    "z": "00 40 06 46",
}
"""Capital letters, in the same notation."""


def lines(strokes: str) -> list[Points]:
    """The polylines of a glyph in the notation of `DIGITS`, centered, one unit from the center to the top."""
    return [
        np.array([((int(x) - 2) / 3, (int(y) - 3) / 3) for x, y in stroke.split()], np.float32)
        for stroke in strokes.split("|")
    ]


def rounded(line: Points) -> Points:
    """The polyline with every corner cut once at a quarter of its sides (Chaikin), its ends kept."""
    before, after = line[:-1], line[1:]
    cut = np.stack([0.75 * before + 0.25 * after, 0.25 * before + 0.75 * after], 1).reshape(-1, 2)
    return np.concatenate([line[:1], cut[1:-1], line[-1:]])


def arc(x: float, y: float, across: float, down: float, start: float, end: float, corners: int = 9) -> Points:
    """(corners, 2) points of an ellipse's arc from angle `start` to `end` in degrees, clockwise from the right."""
    angle = np.radians(np.linspace(start, end, corners))
    return np.stack([x + across * np.cos(angle), y + down * np.sin(angle)], 1).astype(np.float32)


def _regular(corners: int, start: float, radii: tuple[float, ...] = (1.0,)) -> Points:
    angle = np.radians(start + 360 / corners * np.arange(corners))
    radius = np.resize(np.array(radii), corners)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) - 2.5
    return (np.stack([x, y], 1) / 16).astype(np.float32)


def _cross(arm: float = 0.3) -> Points:
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    turns = [
        (x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in quarter
    ]
    return np.array(turns, np.float32)


SHAPES: dict[str, Points] = {
    "circle": _regular(20, 0),
    "square": _regular(4, 45, (1.15,)),
    "triangle": _regular(3, -90, (1.15,)),
    "star": _regular(10, -90, (1.15, 0.48)),
    "heart": _heart(),
    "cross": _cross(),
    "diamond": np.array([(0, -1.15), (0.8, 0), (0, 1.15), (-0.8, 0)], np.float32),
    "moon": np.concatenate([arc(0, 0, 1, 1, 60, 300, 14), arc(0.5, 0, 0.62, 0.87, 270, 90, 10)[1:-1]]),
    "ring": _regular(20, 0),
    "hexagon": _regular(6, 0, (1.08,)),
}
"""Outlines of the shapes; a ring is a circle of which only the rim is drawn."""

ARROW: Points = np.array(
    [(1, 0), (0.1, 0.75), (0.1, 0.28), (-1, 0.28), (-1, -0.28), (0.1, -0.28), (0.1, -0.75)], np.float32
)
"""A block arrow that points right."""

ARROW_LINES: list[Points] = [
    np.array([(-1, 0), (1, 0)], np.float32),
    np.array([(0.35, -0.6), (1, 0), (0.35, 0.6)], np.float32),
]
"""The same arrow in two strokes."""

DIRECTIONS: dict[str, float] = {
    "right": 0,
    "down and right": 45,
    "down": 90,
    "down and left": 135,
    "left": 180,
    "up and left": 225,
    "up": 270,
    "up and right": 315,
}
"""Degrees by which an arrow that points right is turned, clockwise."""

_EYES = [np.array([(x, -0.3), (x, -0.15)], np.float32) for x in (-0.38, 0.38)]
_CLOSED = [np.array([(x - 0.17, -0.2), (x + 0.17, -0.2)], np.float32) for x in (-0.38, 0.38)]
_SMILE = arc(0, 0.1, 0.5, 0.48, 15, 165, 7)
_FROWN = arc(0, 0.78, 0.48, 0.42, 200, 340, 7)
_FLAT = np.array([(-0.35, 0.42), (0.35, 0.42)], np.float32)
_BROWS = [
    np.array([(-0.65, -0.62), (-0.15, -0.38)], np.float32),
    np.array([(0.65, -0.62), (0.15, -0.38)], np.float32),
]

FACES: dict[str, list[Points]] = {
    "happy": [*_EYES, _SMILE],
    "sad": [*_EYES, _FROWN],
    "angry": [*_EYES, *_BROWS, _FROWN],
    "surprised": [*_EYES, arc(0, 0.45, 0.24, 0.28, 0, 360, 10)],
    "sleepy": [*_CLOSED, _FLAT],
    "winking": [_EYES[0], _CLOSED[1], _SMILE],
}
"""Eyes, brows and mouth, in strokes, inside a head of radius one."""
