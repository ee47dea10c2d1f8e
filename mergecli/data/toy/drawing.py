"""The images of the toy tasks: scenes of the kinds that the base knows, each shifted in its own way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b

import numpy as np
from numpy.random import PCG64, Generator
from PIL import Image

from mergecli.data.toy import TASKS
from mergecli.data.toy.canvas import PATTERNS, SIDE, Plane, blur, coverage, distance, flat, paint
from mergecli.data.toy.scenes import POSITIONS, Pose, color, face, figure, pose, texture, two_colors

SOFTNESS, HAZE, GRAIN = 0.7, 0.45, 0.095
"""What the camera does in every task: passes of blur, share of light gray, standard deviation of the noise."""

LAMP = np.array([1.0, 0.7525, 0.45], np.float32)
"""The tint, red to blue, of the light in the task `colours`."""


def camera(rng: Generator, canvas: Plane) -> Plane:
    """The canvas as a poor camera sees it: soft, hazy and grainy.

    All tasks share the camera, so that what one tower learns about it helps the others and a merge has something
    to gain; what is a task's own comes on top.
    """
    canvas = blur(np.clip(canvas, 0, 1), SOFTNESS)
    return noisy(rng, canvas + HAZE * (0.6 - canvas), GRAIN)


def noisy(rng: Generator, canvas: Plane, strength: float) -> Plane:
    """The canvas with normal noise of that standard deviation."""
    return canvas + strength * rng.standard_normal(canvas.shape, np.float32)


def _digits(rng: Generator, name: str) -> Plane:
    """More noise than the camera's."""
    fore, back = two_colors(rng)
    at = pose(rng, size=(0.55, 0.88), style=("plain", "round")[rng.integers(2)])
    canvas = paint(flat(color(rng, back)), figure("digits", name, at), color(rng, fore))
    return noisy(rng, canvas, 0.06 * rng.uniform(0.8, 1.2))


def _letters(rng: Generator, name: str) -> Plane:
    """A stray line across the letter."""
    fore, back = two_colors(rng)
    ink = color(rng, fore)
    at = pose(rng, size=(0.6, 0.88), style=("plain", "round")[rng.integers(2)])
    canvas = paint(flat(color(rng, back)), figure("letters", name, at), ink)
    piece = rng.uniform(-1, 1, (1, 4)).astype(np.float32)
    piece[0, 2:] = piece[0, :2] + 1.6 * (piece[0, 2:] - piece[0, :2])
    return paint(canvas, coverage(distance(piece) - 0.05), color(rng, two_colors(rng, back)[1]))


def _shapes(rng: Generator, name: str) -> Plane:
    """A block that may hide a part."""
    fore, back = two_colors(rng)
    ground = color(rng, back)
    at = pose(rng, size=(0.6, 0.9), style="plain")
    canvas = paint(flat(ground), figure("shapes", name, at), color(rng, fore))
    veil = color(rng, two_colors(rng, fore)[1])
    left, top = rng.integers(0, SIDE - 5, 2)
    across, down = rng.integers(4, 10, 2)
    canvas[top : top + down, left : left + across] = veil
    return canvas


def _textures(rng: Generator, name: str) -> Plane:
    """More blur than the camera's, and uneven contrast."""
    one, other = two_colors(rng)
    canvas = blur(texture(rng, name, color(rng, one), color(rng, other)), 0.4 * rng.uniform(0.7, 1.3))
    middle = rng.uniform(0.35, 0.65)
    return noisy(rng, middle + (canvas - middle) * rng.uniform(0.7, 1.3), 0.03)


def _arrows(rng: Generator, name: str) -> Plane:
    """A faint pattern on the ground."""
    fore, back = two_colors(rng)
    ground = color(rng, back)
    pale = ground + 0.15 * (rng.uniform(0, 1, 3) - ground)
    canvas = texture(rng, PATTERNS[rng.integers(len(PATTERNS))], ground, pale, (4, 9))
    style = ("plain", "round")[rng.integers(2)]
    return paint(canvas, figure("arrows", name, pose(rng, size=(0.5, 0.9), style=style)), color(rng, fore))


def _colors(rng: Generator, name: str) -> Plane:
    """A reddish lamp, bright or dim."""
    _, back = two_colors(rng, name)
    shown = ("shapes", "digits", "letters")[rng.integers(3)]
    names = TASKS[shown].classes
    at = pose(rng, size=(0.5, 0.9), width=(0.1, 0.2))
    cover = figure(shown, names[rng.integers(len(names))], at)
    canvas = paint(flat(color(rng, back)), cover, color(rng, name))
    return canvas * LAMP * rng.uniform(0.8, 1.0) + 0.03


def _positions(rng: Generator, name: str) -> Plane:
    """Two specks besides the shape."""
    fore, back = two_colors(rng)
    canvas = flat(color(rng, back))
    x, y = POSITIONS[name]
    dx, dy = rng.uniform(-0.09, 0.09, 2)
    shapes = TASKS["shapes"].classes
    at = Pose(x + dx, y + dy, rng.uniform(0.22, 0.34), width=0.08)
    canvas = paint(canvas, figure("shapes", shapes[rng.integers(len(shapes))], at), color(rng, fore))
    for spot in rng.uniform(-0.95, 0.95, (2, 2)):
        piece = np.concatenate([spot, spot + rng.uniform(-0.1, 0.1, 2)])[None]
        canvas = paint(canvas, coverage(distance(piece) - 0.05), color(rng, two_colors(rng, back)[1]))
    return noisy(rng, canvas, 0.05)


def _faces(rng: Generator, name: str) -> Plane:
    """A head that leans to one side, more blurred and noisier than the camera makes it."""
    fore, back = two_colors(rng)
    head = color(rng, fore)
    ink = np.full(3, 0.05 if head.sum() > 1.0 else 0.95, np.float32)
    lean = (0.25 if rng.random() < 0.5 else -0.25) * rng.uniform(0.7, 1.3)
    at = replace(pose(rng, size=(0.75, 0.95)), turn=lean)
    return noisy(rng, blur(face(flat(color(rng, back)), name, at, head, ink), 1.0), 0.08)


_SCENES: dict[str, Callable[[Generator, str], Plane]] = {
    "digits": _digits,
    "letters": _letters,
    "shapes": _shapes,
    "textures": _textures,
    "arrows": _arrows,
    "colours": _colors,
    "positions": _positions,
    "faces": _faces,
}


def draw(task: str, split: str, index: int) -> tuple[Image.Image, int]:
    """The index-th image of a task's `train` or `test` split, 32 x 32 RGB, and its label."""
    if split not in ("train", "test"):
        raise ValueError(f"toy task `{task}`: no split `{split}`, only `train` and `test`")
    classes = TASKS[task].classes
    seed = int.from_bytes(blake2b(f"{task}/{split}/{index}".encode(), digest_size=16).digest(), "little")
    label = index % len(classes)
    rng = Generator(PCG64(seed))
    canvas = camera(rng, _SCENES[task](rng, classes[label]))
    return Image.fromarray(np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)), label
