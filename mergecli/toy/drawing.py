"""The images of the toy tasks: every task is a kind of scene that the base knows, shifted in a way of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b

import numpy as np
from numpy.random import PCG64, Generator
from PIL import Image

from mergecli.toy import TASKS
from mergecli.toy.canvas import SIDE, Plane, blur, coverage, distance, flat, paint, place
from mergecli.toy.glyphs import DIRECTIONS, Points
from mergecli.toy.scenes import (
    POSITIONS,
    Pose,
    colour,
    face,
    figure,
    outline,
    pose,
    texture,
    two_colours,
)

DART: Points = np.array([(1, 0), (-0.8, 0.75), (-0.35, 0), (-0.8, -0.75)], np.float32)
"""An arrow without a shaft that points right."""

S = dict(
    noise=0.22, lines=4, blocks=4, fade=0.25, blur=2.0, tint=0.55, dart_noise=0.1, things=5, lean=0.8, cell=3
)


def noisy(rng: Generator, canvas: Plane, strength: float) -> Plane:
    """The canvas with normal noise of that standard deviation."""
    return canvas + strength * rng.standard_normal(canvas.shape, np.float32)


def _digits(rng: Generator, name: str) -> Plane:
    fore, back = two_colours(rng)
    at = pose(rng, size=(0.55, 0.88), style=("plain", "round")[rng.integers(2)])
    canvas = paint(flat(colour(rng, back)), figure("digits", name, at), colour(rng, fore))
    return noisy(rng, canvas, S["noise"] * rng.uniform(0.8, 1.2))


def _letters(rng: Generator, name: str) -> Plane:
    fore, back = two_colours(rng)
    ink = colour(rng, fore)
    at = pose(rng, size=(0.6, 0.88), style=("plain", "round")[rng.integers(2)])
    canvas = paint(flat(colour(rng, back)), figure("letters", name, at), ink)
    for pieces in rng.uniform(-1, 1, (S["lines"], 1, 4)).astype(np.float32):
        pieces[0, 2:] = pieces[0, :2] + 1.6 * (pieces[0, 2:] - pieces[0, :2])
        canvas = paint(canvas, coverage(distance(pieces) - 0.05), colour(rng, two_colours(rng, back)[1]))
    return canvas


def _shapes(rng: Generator, name: str) -> Plane:
    fore, back = two_colours(rng)
    ground = colour(rng, back)
    at = pose(rng, size=(0.6, 0.9), style="plain")
    canvas = paint(flat(ground), figure("shapes", name, at), colour(rng, fore))
    veil = colour(rng, two_colours(rng, fore)[1])
    for left, top in rng.integers(0, SIDE - 5, (S["blocks"], 2)):
        across, down = rng.integers(4, 10, 2)
        canvas[top : top + down, left : left + across] = veil
    return canvas


def _textures(rng: Generator, name: str) -> Plane:
    one, other = two_colours(rng)
    canvas = blur(texture(rng, name, colour(rng, one), colour(rng, other)), S["blur"] * rng.uniform(0.7, 1.3))
    middle = rng.uniform(0.35, 0.65)
    return noisy(rng, middle + (canvas - middle) * S["fade"] * rng.uniform(0.7, 1.3), 0.03)


def _arrows(rng: Generator, name: str) -> Plane:
    fore, back = two_colours(rng)
    at = pose(rng, size=(0.5, 0.9), turn=0.2)
    at = replace(at, turn=at.turn + float(np.radians(DIRECTIONS[name])))
    canvas = paint(flat(colour(rng, back)), outline(DART, at), colour(rng, fore))
    return noisy(rng, canvas, S["dart_noise"])


def _colours(rng: Generator, name: str) -> Plane:
    _, back = two_colours(rng, name)
    shown = ("shapes", "digits", "letters")[rng.integers(3)]
    names = TASKS[shown].classes
    at = pose(rng, size=(0.5, 0.9), width=(0.1, 0.2))
    cover = figure(shown, names[rng.integers(len(names))], at)
    canvas = paint(flat(colour(rng, back)), cover, colour(rng, name))
    lamp = np.array([1.0, 1 - 0.45 * S["tint"], 1 - S["tint"]], np.float32)
    return canvas * lamp * rng.uniform(0.8, 1.0) + 0.03


def _positions(rng: Generator, name: str) -> Plane:
    fore, back = two_colours(rng)
    canvas = flat(colour(rng, back))
    x, y = POSITIONS[name]
    dx, dy = rng.uniform(-0.09, 0.09, 2)
    shapes = TASKS["shapes"].classes
    at = Pose(x + dx, y + dy, rng.uniform(0.22, 0.34), width=0.08)
    canvas = paint(canvas, figure("shapes", shapes[rng.integers(len(shapes))], at), colour(rng, fore))
    for px, py in rng.uniform(-0.95, 0.95, (S["things"], 2)):
        spot = place(np.zeros((1, 2), np.float32), px, py, 1.0)
        pieces = np.concatenate([spot, spot + rng.uniform(-0.1, 0.1, (1, 2)).astype(np.float32)], 1)
        canvas = paint(canvas, coverage(distance(pieces) - 0.05), colour(rng, two_colours(rng, back)[1]))
    return noisy(rng, canvas, 0.05)


def _faces(rng: Generator, name: str) -> Plane:
    fore, back = two_colours(rng)
    head = colour(rng, fore)
    ink = np.full(3, 0.05 if head.sum() > 1.0 else 0.95, np.float32)
    lean = S["lean"] * (1 if rng.random() < 0.5 else -1) * rng.uniform(0.7, 1.3)
    at = replace(pose(rng, size=(0.75, 0.95)), turn=lean)
    return noisy(rng, blur(face(flat(colour(rng, back)), name, at, head, ink), 1.0), 0.08)


_SCENES: dict[str, Callable[[Generator, str], Plane]] = {
    "digits": _digits,
    "letters": _letters,
    "shapes": _shapes,
    "textures": _textures,
    "arrows": _arrows,
    "colours": _colours,
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
    canvas = _SCENES[task](Generator(PCG64(seed)), classes[label])
    return Image.fromarray(np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)), label
