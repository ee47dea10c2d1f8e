"""Scenes: a figure of some kind and class painted on a canvas, each with its pose, colors and stroke style."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mergecli.data.toy.canvas import (
    PATTERNS,
    Plane,
    coverage,
    distance,
    flat,
    paint,
    pattern,
    place,
    segments,
)
from mergecli.data.toy.canvas import signed_distance as outline_distance
from mergecli.data.toy.glyphs import (
    ARROW,
    ARROW_LINES,
    DIGITS,
    DIRECTIONS,
    FACES,
    LETTERS,
    SHAPES,
    Points,
    lines,
    rounded,
)

Color = NDArray[np.floating[Any]]

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.10),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.95, 0.90, 0.15),
    "green": (0.12, 0.65, 0.18),
    "blue": (0.12, 0.22, 0.86),
    "purple": (0.50, 0.12, 0.66),
    "pink": (0.98, 0.58, 0.75),
    "brown": (0.45, 0.26, 0.10),
    "white": (0.95, 0.95, 0.95),
    "black": (0.06, 0.06, 0.06),
}

POSITIONS: dict[str, tuple[float, float]] = {
    "top left": (-0.6, -0.6),
    "top": (0, -0.6),
    "top right": (0.6, -0.6),
    "left": (-0.6, 0),
    "centre": (0, 0),
    "right": (0.6, 0),
    "bottom left": (-0.6, 0.6),
    "bottom": (0, 0.6),
    "bottom right": (0.6, 0.6),
}

_GLYPHS: dict[str, list[Points]] = {name: lines(strokes) for name, strokes in (DIGITS | LETTERS).items()}
_ROUND = {name: [rounded(line) for line in drawn] for name, drawn in _GLYPHS.items()}

CLASSES: dict[str, tuple[str, ...]] = {
    "digits": tuple(DIGITS),
    "letters": tuple(LETTERS),
    "shapes": tuple(SHAPES),
    "textures": PATTERNS,
    "arrows": tuple(DIRECTIONS),
    "colours": tuple(COLORS),
    "positions": tuple(POSITIONS),
    "faces": tuple(FACES),
}
"""What can be painted, kind by kind."""


@dataclass(frozen=True)
class Pose:
    """Where and how a figure stands."""

    x: float = 0.0
    y: float = 0.0
    size: float = 0.7
    turn: float = 0.0
    """Radians, clockwise."""
    slant: float = 0.0
    width: float = 0.1
    """Half the width of a stroke, where the canvas is two wide."""
    style: str = "plain"
    """`plain`, `round` (softer corners), `hollow` (only the rim of the figure) or `dashed`."""


def pose(
    rng: Generator,
    *,
    size: tuple[float, float] = (0.5, 0.85),
    turn: float = 0.15,
    slant: float = 0.2,
    width: tuple[float, float] = (0.07, 0.15),
    style: str = "plain",
    reach: float = 1.0,
) -> Pose:
    """A random pose that stays inside the canvas; `reach` is the share of the free room it may stray into."""
    scale = rng.uniform(*size)
    room = max(0.0, 0.92 - scale) * reach
    x, y, turned, slanted = rng.uniform(-1, 1, 4)
    return Pose(
        x * room,
        y * room,
        scale,
        turned * turn,
        slanted * slant,
        rng.uniform(*width) * (0.4 + scale),
        style=style,
    )


def shade(rng: Generator, rgb: tuple[float, float, float], spread: float = 0.08) -> Color:
    """(3,) a color like the given one."""
    near = np.array(rgb) * rng.uniform(1 - spread, 1 + spread / 2) + rng.uniform(-spread, spread, 3)
    return np.clip(near, 0, 1).astype(np.float32)


def color(rng: Generator, name: str) -> Color:
    """(3,) a shade of the named color."""
    return shade(rng, COLORS[name])


def two_colors(rng: Generator, first: str | None = None) -> tuple[str, str]:
    """Two names of colors that can be told apart, the first one given or random."""
    names = list(COLORS)
    one = first or names[rng.integers(len(names))]
    while True:
        other = names[rng.integers(len(names))]
        if np.abs(np.subtract(COLORS[one], COLORS[other])).sum() > 0.7:
            return one, other


def _dashed(drawn: list[Points]) -> list[Points]:
    dashes: list[Points] = []
    for line in drawn:
        for start, end in itertools.pairwise(line):
            count = max(1, round(float(np.hypot(*(end - start))) / 0.3))
            steps = np.linspace(0, 1, count + 1, dtype=np.float32)[:, None]
            knots = start + steps * (end - start)
            dashes += [np.stack([a, a + 0.55 * (b - a)]) for a, b in itertools.pairwise(knots)]
    return dashes


def strokes(drawn: list[Points], at: Pose) -> Plane:
    """(SIDE, SIDE) cover of polylines in a pose."""
    if at.style == "dashed":
        drawn = _dashed(drawn)
    placed = [place(line, at.x, at.y, at.size, at.turn, at.slant) for line in drawn]
    reach = distance(segments(placed))
    if at.style == "hollow":
        return coverage(np.abs(reach - at.width * 1.3) - 0.045)
    return coverage(reach - at.width)


def outline(points: Points, at: Pose, rim: bool = False) -> Plane:
    """(SIDE, SIDE) cover of a closed figure, filled, or its rim alone."""
    placed = place(points, at.x, at.y, at.size, at.turn, at.slant)
    if at.style == "dashed":
        return strokes([np.concatenate([points, points[:1]])], at)
    depth = outline_distance(placed)
    if rim or at.style == "hollow":
        return coverage(np.abs(depth + at.width) - at.width * (1.3 if rim else 0.8))
    return coverage(depth)


def figure(kind: str, name: str, at: Pose) -> Plane:
    """(SIDE, SIDE) cover of a digit, letter, shape or arrow."""
    if kind in ("digits", "letters"):
        return strokes((_ROUND if at.style == "round" else _GLYPHS)[name], at)
    if kind == "shapes":
        return outline(SHAPES[name], at, rim=name == "ring")
    turned = replace(at, turn=at.turn + float(np.radians(DIRECTIONS[name])))
    if at.style in ("round", "dashed"):
        return strokes(ARROW_LINES, turned)
    return outline(ARROW, turned)


def face(canvas: Plane, name: str, at: Pose, head: Color, ink: Color) -> Plane:
    """The canvas with a face on it: a round head in one color, eyes, brows and mouth in another."""
    skull = outline_distance(place(SHAPES["circle"], at.x, at.y, at.size, at.turn))
    cover = coverage(np.abs(skull) - 0.05 if at.style == "hollow" else skull)
    canvas = paint(canvas, cover, head)
    features = replace(at, width=at.width * 0.75, style="plain")
    return paint(canvas, strokes(FACES[name], features), ink)


def texture(
    rng: Generator,
    name: str,
    one: Color,
    other: Color,
    period: tuple[float, float] = (5, 9),
) -> Plane:
    """A canvas filled with a pattern in two colors."""
    turn = rng.uniform(-0.25, 0.25)
    if name in ("stripes", "waves", "zigzag"):
        turn += rng.integers(4) * np.pi / 4
    x, y = rng.random(2)
    return paint(flat(other), pattern(name, rng.uniform(*period), turn, x, y), one)
