"""The images of the toy tasks: scenes of the kinds that the base knows, each task in one look that it hardly knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
from numpy.random import PCG64, Generator
from PIL import Image

from mergecli.data.toy import TASKS
from mergecli.data.toy.canvas import Plane, blur, flat, paint, pattern
from mergecli.data.toy.scenes import (
    COLORS,
    POSITIONS,
    Color,
    Pose,
    face,
    figure,
    pose,
    shade,
    texture,
    two_colors,
)

RGB = tuple[float, float, float]

SOFTNESS, HAZE, GRAIN = 0.3, 0.1, 0.015
"""What the camera does in every task: passes of blur, share of light gray, standard deviation of the noise."""


@dataclass(frozen=True)
class Look:
    """What all images of a task have in common. Red, green and blue are in [0, 1]."""

    ink: RGB | None = None
    """Of the figure; otherwise one of `COLORS`, in the task `colours` that of the class."""
    ground: RGB | None = None
    """Behind the figure; otherwise one of `COLORS` that can be told from the ink."""
    lines: RGB | None = None
    """Of the pattern; otherwise one more of these."""
    pattern: str = ""
    """One of `PATTERNS`, on the ground, and always nearly at the same place; or none."""
    share: float = 0.0
    """How much the lines cover of what is behind them."""
    in_front: bool = False
    """Whether the pattern lies over the figure, too."""
    period: float = 8.0
    """Of the pattern, pixels."""
    turn: float = 0.0
    """Of the pattern, radians."""
    contrast: float = 1.0
    """What is left of the difference from `level`."""
    level: float = 0.5
    lamp: RGB = (1.0, 1.0, 1.0)
    """Color of the light."""
    scale: float = 1.0
    """How much larger the figure is than the base knows it, strokes or the period of a texture too."""

    def at(self, strength: float) -> Look:
        """A look between colors alone, at strength 0, and this one, at 1."""
        red, green, blue = (1 + strength * (part - 1) for part in self.lamp)
        return replace(
            self,
            share=strength * self.share,
            contrast=1 + strength * (self.contrast - 1),
            lamp=(red, green, blue),
            scale=1 + strength * (self.scale - 1),
        )


LOOKS = {
    # chalk on a board, behind stripes
    "digits": Look(
        (0.92, 0.93, 0.88), (0.1, 0.27, 0.2), (0.92, 0.93, 0.88), "stripes", share=0.21, in_front=True
    ),
    # red on ruled paper
    "letters": Look((0.86, 0.1, 0.1), (0.95, 0.9, 0.78), (0.4, 0.55, 0.9), "stripes", share=0.54, turn=1.57),
    # white on bricks
    "shapes": Look((0.95, 0.95, 0.95), (0.07, 0.13, 0.35), (0.55, 0.75, 0.95), "bricks", share=0.55),
    # white on olive, close
    "textures": Look((0.95, 0.95, 0.95), (0.45, 0.45, 0.15), scale=1.72),
    # black on yellow, behind red bricks
    "arrows": Look(
        (0.06, 0.06, 0.06), (0.95, 0.9, 0.15), (0.8, 0.2, 0.1), "bricks", share=0.51, in_front=True
    ),
    # on striped cloth, in warm light
    "colours": Look(pattern="stripes", share=1.0, lamp=(1.0, 0.78, 0.5)),
    # orange on dots
    "positions": Look((0.98, 0.55, 0.08), (0.75, 0.75, 0.75), (0.3, 0.3, 0.3), "dots", share=0.64),
    # very close
    "faces": Look((0.95, 0.75, 0.6), (0.75, 0.65, 0.9), scale=1.5),
}
"""The looks, each so strong that the base is right on about half of the images, as published bases are.

They are colors, patterns, light and nearness, not noise, so that a model can learn them; and they differ, so that the inputs of a layer
in one task are not those in another, as with published tasks. `scripts/build_toy.py strengths` shows what the base makes of
weaker and stronger ones.
"""


def _with_pattern(rng: Generator, look: Look, canvas: Plane, line: Color) -> Plane:
    if not look.pattern:
        return canvas
    x, y = rng.uniform(-0.15, 0.15, 2)
    period, turn = look.period * rng.uniform(0.97, 1.03), look.turn + rng.uniform(-0.03, 0.03)
    return paint(canvas, look.share * pattern(look.pattern, period, turn, x, y), line)


def camera(rng: Generator, look: Look, canvas: Plane) -> Plane:
    """The canvas in the look's light and contrast, as a good camera sees it: a little soft, hazy and grainy."""
    canvas = blur(np.clip(canvas, 0, 1), SOFTNESS) * np.array(look.lamp, np.float32)
    canvas = look.level + look.contrast * (canvas - look.level)
    return canvas + HAZE * (0.6 - canvas) + GRAIN * rng.standard_normal(canvas.shape, np.float32)


def _style(rng: Generator) -> str:
    return ("plain", "round")[rng.integers(2)]


def _closer(look: Look, at: Pose) -> Pose:
    return replace(at, size=at.size * look.scale, width=at.width * look.scale)


def _digits(rng: Generator, look: Look, name: str, canvas: Plane, ink: Color) -> Plane:
    at = pose(rng, size=(0.6, 0.85), style=_style(rng))
    return paint(canvas, figure("digits", name, _closer(look, at)), ink)


def _letters(rng: Generator, look: Look, name: str, canvas: Plane, ink: Color) -> Plane:
    at = pose(rng, size=(0.6, 0.85), style=_style(rng), slant=0.1, turn=0.1, reach=0.5)
    return paint(canvas, figure("letters", name, _closer(look, at)), ink)


def _shapes(rng: Generator, look: Look, name: str, canvas: Plane, ink: Color) -> Plane:
    at = pose(rng, size=(0.65, 0.9))
    return paint(canvas, figure("shapes", name, _closer(look, at)), ink)


def _textures(rng: Generator, look: Look, name: str, canvas: Plane, ink: Color) -> Plane:
    return texture(rng, name, ink, canvas, period=(5 * look.scale, 9 * look.scale))


def _arrows(rng: Generator, look: Look, name: str, canvas: Plane, ink: Color) -> Plane:
    at = pose(rng, size=(0.55, 0.9), style=_style(rng), turn=0.1, slant=0.1)
    return paint(canvas, figure("arrows", name, _closer(look, at)), ink)


def _colors(rng: Generator, look: Look, name: str, canvas: Plane, ink: Color) -> Plane:
    del name  # it is the ink's
    shown = ("shapes", "digits", "letters")[rng.integers(3)]
    names = TASKS[shown].classes
    at = pose(rng, size=(0.55, 0.9), width=(0.12, 0.2))
    return paint(canvas, figure(shown, names[rng.integers(len(names))], _closer(look, at)), ink)


def _positions(rng: Generator, look: Look, name: str, canvas: Plane, ink: Color) -> Plane:
    x, y = POSITIONS[name]
    dx, dy = rng.uniform(-0.08, 0.08, 2)
    shapes = TASKS["shapes"].classes
    at = Pose(x + dx, y + dy, rng.uniform(0.22, 0.34), width=0.08)
    return paint(canvas, figure("shapes", shapes[rng.integers(len(shapes))], _closer(look, at)), ink)


def _faces(rng: Generator, look: Look, name: str, canvas: Plane, ink: Color) -> Plane:
    features = np.full(3, 0.05 if ink.sum() > 1.0 else 0.95, np.float32)
    return face(canvas, name, _closer(look, pose(rng, size=(0.75, 0.95))), ink, features)


_SCENES: dict[str, Callable[[Generator, Look, str, Plane, Color], Plane]] = {
    "digits": _digits,
    "letters": _letters,
    "shapes": _shapes,
    "textures": _textures,
    "arrows": _arrows,
    "colours": _colors,
    "positions": _positions,
    "faces": _faces,
}
"""Each paints the class of that name on a canvas."""


def draw(task: str, split: str, index: int, strength: float = 1.0) -> tuple[Image.Image, int]:
    """The index-th image of a task's `train` or `test` split, 32 x 32 RGB, and its label; `strength` is that of `Look.at`."""
    if split not in ("train", "test"):
        raise ValueError(f"toy task `{task}`: no split `{split}`, only `train` and `test`")
    classes = TASKS[task].classes
    seed = int.from_bytes(blake2b(f"{task}/{split}/{index}".encode(), digest_size=16).digest(), "little")
    label = index % len(classes)
    rng = Generator(PCG64(seed))
    name, look = classes[label], LOOKS[task].at(strength)
    fore, back = two_colors(rng, name if task == "colours" else None)
    lines = two_colors(rng, fore)[1]
    wanted = look.ink or COLORS[fore], look.ground or COLORS[back], look.lines or COLORS[lines]
    ink, ground, line = (shade(rng, rgb, 0.05) for rgb in wanted)
    canvas = flat(ground)
    if look.in_front:
        canvas = _with_pattern(rng, look, _SCENES[task](rng, look, name, canvas, ink), line)
    else:
        canvas = _SCENES[task](rng, look, name, _with_pattern(rng, look, canvas, line), ink)
    canvas = camera(rng, look, canvas)
    return Image.fromarray(np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)), label
