"""The toy zoo: eight image tasks drawn by code, and small CLIP towers that learned them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class ToyTask:
    """One image task; its images come from `mergecli.data.toy.drawing.draw`."""

    name: str
    description: str
    classes: tuple[str, ...]
    """What the labels 0, 1, ... stand for, in the words of a prompt."""
    templates: tuple[str, ...]
    """Prompts; `{}` stands for the class."""
    train: int
    """Number of training images."""
    test: int
    """Number of test images, a multiple of the number of classes."""
    fingerprints: tuple[str, str]
    """What results call the training images and the test images; corruptions draw their noise from it, too. A constant, and
    another one once the images are drawn otherwise: a digest of the drawing code would change with every comment."""


_ALL = (
    ToyTask(
        name="digits",
        description="digits that are turned",
        classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        templates=("a photo of the digit {}", "a drawing of the number {}", "the numeral {}"),
        train=2000,
        test=450,
        fingerprints=("xxh3:ff357b322a305926fa1627c351eac2e1", "xxh3:fa7eec2d8e5e5789e1f10119e8d83df6"),
    ),
    ToyTask(
        name="letters",
        description="capital letters in italics",
        classes=tuple("abcdefghijklmnopqrstuvwxyz"),
        templates=("a photo of the letter {}", "a drawing of the capital letter {}", "the character {}"),
        train=2080,
        test=468,
        fingerprints=("xxh3:419d4088395000336a958af2451daf97", "xxh3:305d9719ea2941db6843cf38b910a735"),
    ),
    ToyTask(
        name="shapes",
        description="shapes seen from the side, and so less high",
        classes=(
            "circle",
            "square",
            "triangle",
            "star",
            "heart",
            "cross",
            "diamond",
            "moon",
            "ring",
            "hexagon",
        ),
        templates=("a photo of a {}", "a drawing of a {} shape", "the shape of a {}"),
        train=2000,
        test=450,
        fingerprints=("xxh3:529f37e16bb6f73a3bf9e61806e3c1ae", "xxh3:cadfd93c09dd94b522da45a3688ee2da"),
    ),
    ToyTask(
        name="textures",
        description="patterns that are turned",
        classes=("stripes", "checks", "dots", "grid", "waves", "zigzag", "bricks", "rings"),
        templates=("a photo of a {} pattern", "a pattern of {}", "a texture of {}"),
        train=2000,
        test=448,
        fingerprints=("xxh3:7a97fed52fad74484656a5ef6164afc5", "xxh3:9feebee0b8bad636e7bb2cc8db52a22b"),
    ),
    ToyTask(
        name="arrows",
        description="where arrows point, for a camera that is turned",
        classes=(
            "up",
            "up and right",
            "right",
            "down and right",
            "down",
            "down and left",
            "left",
            "up and left",
        ),
        templates=(
            "a photo of an arrow pointing {}",
            "a drawing of an arrow that points {}",
            "the direction {}",
        ),
        train=2000,
        test=448,
        fingerprints=("xxh3:239bd0b93057e49c4395a026f33027f1", "xxh3:76e07bd3076ebc03893fb33827883d58"),
    ),
    ToyTask(
        name="colours",
        description="colours of things in bluish light",
        classes=("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black"),
        templates=("a photo of something {}", "a drawing of something {}", "the colour {}"),
        train=2000,
        test=450,
        fingerprints=("xxh3:b28b1dc15ceb3831efe00a8f02960605", "xxh3:f4264a5d5ef9aa82284f528e35b060fe"),
    ),
    ToyTask(
        name="positions",
        description="where a small shape stands, for a camera that looks past",
        classes=(
            "top left",
            "top",
            "top right",
            "left",
            "centre",
            "right",
            "bottom left",
            "bottom",
            "bottom right",
        ),
        templates=("a photo of something at the {}", "a drawing of something in the {}", "a thing at the {}"),
        train=1998,
        test=450,
        fingerprints=("xxh3:eb58a23c6965bf43d795cf2303177509", "xxh3:87668161150b9666b85d1d2745884842"),
    ),
    ToyTask(
        name="faces",
        description="faces that are turned",
        classes=("happy", "sad", "angry", "surprised", "sleepy", "winking"),
        templates=("a photo of a {} face", "a drawing of a face that looks {}", "somebody {}"),
        train=1998,
        test=450,
        fingerprints=("xxh3:4a4f41b0b7a5b75bfe46de2050032a9c", "xxh3:0ff5d64ab22e728826db1500bfa0ebfd"),
    ),
)

TASKS: Mapping[str, ToyTask] = MappingProxyType({task.name: task for task in _ALL})
"""The eight tasks by name, in their order."""
