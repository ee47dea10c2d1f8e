"""Captioned pictures, on which the toy base is pre-trained: one figure on a ground, and a sentence about it."""

from __future__ import annotations

import re

import numpy as np
from numpy.random import PCG64, Generator

from mergecli.data.toy.canvas import PATTERNS, Plane, blur, flat, paint
from mergecli.data.toy.scenes import (
    CLASSES,
    POSITIONS,
    Color,
    Pose,
    color,
    face,
    figure,
    pose,
    texture,
    two_colors,
)

SHARES = {
    "digits": 0.12,
    "letters": 0.21,
    "shapes": 0.10,
    "textures": 0.08,
    "arrows": 0.18,
    "colours": 0.04,
    "positions": 0.17,
    "faces": 0.10,
}
"""How often each kind of picture is drawn."""


PREFIXES = ("a photo of ", "a picture of ", "a drawing of ", "an image of ", "", "")


PHRASES: dict[str, tuple[str, ...]] = {
    "digits": ("the {c}digit {}", "the {c}number {}", "a {c}{}", "the {c}numeral {}", "a {c}digit {}"),
    "letters": ("the {c}letter {}", "a {c}letter {}", "the {c}capital letter {}", "the {c}character {}"),
    "shapes": ("a {c}{}", "a {c}{} shape", "the shape of a {c}{}", "a {c}{}"),
    "textures": ("a {} pattern", "a pattern of {}", "a texture of {}", "{}", "{} all over"),
    "arrows": (
        "a {c}arrow pointing {}",
        "a {c}arrow that points {}",
        "a {c}sign pointing {}",
        "the {c}direction {}",
    ),
    "faces": ("a {} {c}face", "a {c}face that looks {}", "a {} {c}person", "somebody {}"),
    "positions": (
        "a {c}{what} at the {}",
        "a {c}{what} in the {}",
        "something {c}at the {}",
        "a {c}thing in the {}",
    ),
    "colours": ("a {} {what}", "something {}", "a {} thing", "a {what} in {}", "the colour {}"),
}


GROUNDS = (" on {}", " on a {} ground", " over {}", " in front of {}")


def _pick(rng: Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def disturb(rng: Generator, canvas: Plane) -> Plane:
    """The canvas with mild blur, contrast, brightness, tint and noise, each now and then."""
    odds = rng.random(5)
    if odds[0] < 0.25:
        canvas = blur(canvas, rng.uniform(0.2, 1.3))
    if odds[1] < 0.35:
        middle = rng.uniform(0.3, 0.7)
        canvas = middle + (canvas - middle) * rng.uniform(0.5, 1)
    if odds[2] < 0.25:
        canvas = canvas * rng.uniform(0.75, 1.1)
    if odds[3] < 0.15:
        canvas = canvas * rng.uniform(0.85, 1.1, 3).astype(np.float32)
    if odds[4] < 0.4:
        canvas = canvas + rng.normal(0, rng.uniform(0.01, 0.08), canvas.shape).astype(np.float32)
    return canvas


def _begin(index: int) -> tuple[Generator, str]:
    rng = Generator(PCG64([index, 8]))
    return rng, str(rng.choice(list(SHARES), p=list(SHARES.values())))


def kind_of(index: int) -> str:
    """The kind of the index-th picture, a key of `SHARES`."""
    return _begin(index)[1]


def compose(index: int) -> tuple[Plane, str]:
    """The index-th captioned picture: a (32, 32, 3) canvas in [0, 1] and its sentence."""
    rng, kind = _begin(index)
    name = _pick(rng, CLASSES[kind])
    fore, back = two_colors(rng, name if kind == "colours" else None)
    one, other = color(rng, fore), color(rng, back)
    said = ""
    if kind == "textures":
        canvas = texture(rng, name, one, other)
        ending = f" in {fore} and {back}"
    else:
        canvas, ending = flat(other), back
        if rng.random() < 0.12:
            ground = _pick(rng, PATTERNS)
            canvas = texture(rng, ground, other, other * rng.uniform(0.75, 0.9), (6, 12))
            ending = f"{back} {ground}"
        canvas, said = _put(rng, kind, name, canvas, one)
        ending = _pick(rng, GROUNDS).format(ending)
    phrase = _pick(rng, PHRASES[kind])
    shade = f"{fore} " if rng.random() < 0.5 else ""
    sentence = _pick(rng, PREFIXES) + phrase.format(name, c=shade, what=said)
    if rng.random() < 0.5:
        sentence += ending
    sentence = re.sub(r"\ba (?=[aeiou]\w)", "an ", sentence)
    return np.clip(disturb(rng, canvas), 0, 1), sentence


def _put(rng: Generator, kind: str, name: str, canvas: Plane, one: Color) -> tuple[Plane, str]:
    """The canvas with a figure of that kind, and the figure's name."""
    style = str(rng.choice(("plain", "round", "hollow", "dashed"), p=(0.45, 0.35, 0.12, 0.08)))
    if kind == "faces":
        ink = np.full(3, 0.05 if one.sum() > 1.0 else 0.95, np.float32)
        hollow = rng.random() < 0.2
        at = pose(rng, size=(0.7, 0.95), style="hollow" if hollow else "plain")
        return face(canvas, name, at, one, one if hollow else ink), "face"
    if kind in ("colours", "positions"):
        shown = str(rng.choice(("shapes", "digits", "letters", "shapes")))
        what = _pick(rng, CLASSES[shown])
        said = {"digits": "digit ", "letters": "letter "}.get(shown, "") + what
        if kind == "colours":
            return paint(canvas, figure(shown, what, pose(rng, size=(0.4, 0.9), width=(0.1, 0.2))), one), said
        x, y = POSITIONS[name]
        size, (dx, dy) = rng.uniform(0.2, 0.38), rng.uniform(-0.09, 0.09, 2)
        at = Pose(x + dx, y + dy, size, rng.uniform(-0.15, 0.15), 0.0, size * rng.uniform(0.15, 0.3))
        return paint(canvas, figure(shown, what, at), one), said
    size = (0.45, 0.9) if kind in ("shapes", "arrows") else (0.55, 0.88)
    if kind == "shapes" and style == "round":
        style = "plain"
    return paint(canvas, figure(kind, name, pose(rng, size=size, style=style)), one), ""
