"""The images of the toy tasks: scenes of the kinds that the base knows, each seen in one way that it hardly knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b

import numpy as np
from numpy.random import PCG64, Generator
from PIL import Image

from mergecli.data.toy import TASKS
from mergecli.data.toy.canvas import Plane, blur, flat, paint
from mergecli.data.toy.scenes import POSITIONS, Pose, color, face, figure, pose, texture, two_colors

SOFTNESS, HAZE, GRAIN = 0.3, 0.1, 0.015
"""What the camera does in every task: passes of blur, share of light gray, standard deviation of the noise."""

STRENGTHS = {
    "digits": 0.46,
    "letters": 0.52,
    "shapes": 0.7,
    "textures": 0.9,
    "arrows": 0.36,
    "colours": 0.85,
    "positions": 0.22,
    "faces": 0.65,
}
"""How far each task lies from what the base was trained on: `scripts/build_toy.py strengths` shows what the base makes of others.

They are changes of view and light, not noise, so that a model can learn them. Each is so strong that the base is right on about
half of the images, as published bases are.
"""

LAMP = np.array([0.30, 0.75, 1.0], np.float32)
"""The tint, red to blue, of the light in the task `colours` at strength 1."""


def camera(rng: Generator, canvas: Plane) -> Plane:
    """The canvas as a good camera sees it: a little soft, hazy and grainy."""
    canvas = blur(np.clip(canvas, 0, 1), SOFTNESS)
    return canvas + HAZE * (0.6 - canvas) + GRAIN * rng.standard_normal(canvas.shape, np.float32)


def _style(rng: Generator) -> str:
    return ("plain", "round")[rng.integers(2)]


def _digits(rng: Generator, name: str, strength: float) -> Plane:
    """Digits turned clockwise, by `strength` radians."""
    fore, back = two_colors(rng)
    at = pose(rng, size=(0.6, 0.85), style=_style(rng))
    at = replace(at, turn=at.turn + strength)
    return paint(flat(color(rng, back)), figure("digits", name, at), color(rng, fore))


def _letters(rng: Generator, name: str, strength: float) -> Plane:
    """Italics: letters slanted by `strength`."""
    fore, back = two_colors(rng)
    at = pose(rng, size=(0.6, 0.85), style=_style(rng), slant=0.1, turn=0.1, reach=0.5)
    at = replace(at, slant=at.slant + strength)
    return paint(flat(color(rng, back)), figure("letters", name, at), color(rng, fore))


def _shapes(rng: Generator, name: str, strength: float) -> Plane:
    """Shapes seen from the side, which makes them `strength` of their height."""
    fore, back = two_colors(rng)
    at = replace(pose(rng, size=(0.65, 0.9), style="plain"), squeeze=strength)
    return paint(flat(color(rng, back)), figure("shapes", name, at), color(rng, fore))


def _textures(rng: Generator, name: str, strength: float) -> Plane:
    """Patterns turned by `strength` radians."""
    one, other = two_colors(rng)
    return texture(rng, name, color(rng, one), color(rng, other), tilt=strength)


def _arrows(rng: Generator, name: str, strength: float) -> Plane:
    """A camera that is turned: every arrow points `strength` radians further clockwise."""
    fore, back = two_colors(rng)
    at = pose(rng, size=(0.55, 0.9), style=_style(rng), turn=0.1, slant=0.1)
    at = replace(at, turn=at.turn + strength)
    return paint(flat(color(rng, back)), figure("arrows", name, at), color(rng, fore))


def _colors(rng: Generator, name: str, strength: float) -> Plane:
    """A share `strength` of a bluish lamp."""
    _, back = two_colors(rng, name)
    shown = ("shapes", "digits", "letters")[rng.integers(3)]
    names = TASKS[shown].classes
    at = pose(rng, size=(0.55, 0.9), width=(0.12, 0.2))
    canvas = flat(color(rng, back))
    canvas = paint(canvas, figure(shown, names[rng.integers(len(names))], at), color(rng, name))
    return canvas * (1 + strength * (LAMP - 1)) * rng.uniform(0.9, 1.0)


def _positions(rng: Generator, name: str, strength: float) -> Plane:
    """A camera that looks past: everything lies `strength` further right and down."""
    fore, back = two_colors(rng)
    x, y = POSITIONS[name]
    dx, dy = rng.uniform(-0.08, 0.08, 2) + strength
    shapes = TASKS["shapes"].classes
    at = Pose(x + dx, y + dy, rng.uniform(0.22, 0.34), width=0.08)
    return paint(
        flat(color(rng, back)), figure("shapes", shapes[rng.integers(len(shapes))], at), color(rng, fore)
    )


def _faces(rng: Generator, name: str, strength: float) -> Plane:
    """Heads turned clockwise, by `strength` radians."""
    fore, back = two_colors(rng)
    head = color(rng, fore)
    ink = np.full(3, 0.05 if head.sum() > 1.0 else 0.95, np.float32)
    at = pose(rng, size=(0.75, 0.95))
    return face(flat(color(rng, back)), name, replace(at, turn=at.turn + strength), head, ink)


_SCENES: dict[str, Callable[[Generator, str, float], Plane]] = {
    "digits": _digits,
    "letters": _letters,
    "shapes": _shapes,
    "textures": _textures,
    "arrows": _arrows,
    "colours": _colors,
    "positions": _positions,
    "faces": _faces,
}


def draw(task: str, split: str, index: int, strength: float | None = None) -> tuple[Image.Image, int]:
    """The index-th image of a task's `train` or `test` split, 32 x 32 RGB, and its label; `strength` in place of the task's."""
    if split not in ("train", "test"):
        raise ValueError(f"toy task `{task}`: no split `{split}`, only `train` and `test`")
    classes = TASKS[task].classes
    seed = int.from_bytes(blake2b(f"{task}/{split}/{index}".encode(), digest_size=16).digest(), "little")
    label = index % len(classes)
    rng = Generator(PCG64(seed))
    scene = _SCENES[task](rng, classes[label], STRENGTHS[task] if strength is None else strength)
    canvas = camera(rng, scene)
    return Image.fromarray(np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)), label
