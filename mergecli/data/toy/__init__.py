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
        description="digits in chalk behind stripes",
        classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        templates=("a photo of the digit {}", "a drawing of the number {}", "the numeral {}"),
        train=2000,
        test=450,
        fingerprints=("xxh3:554f8ff24535544fa3b8e88617f600ba", "xxh3:01c742d7604118c1d269c47518002700"),
    ),
    ToyTask(
        name="letters",
        description="capital letters on ruled paper",
        classes=tuple("abcdefghijklmnopqrstuvwxyz"),
        templates=("a photo of the letter {}", "a drawing of the capital letter {}", "the character {}"),
        train=2080,
        test=468,
        fingerprints=("xxh3:5f05bfb496dd7dfb4534d758c25f933f", "xxh3:bdab66513dce799a32df266b32400dee"),
    ),
    ToyTask(
        name="shapes",
        description="white shapes on bricks",
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
        fingerprints=("xxh3:2c6187f25dabd8ab8c0c0a9aad0e549e", "xxh3:e567bc9913174732f6f4fd06269f12cd"),
    ),
    ToyTask(
        name="textures",
        description="patterns seen from very near",
        classes=("stripes", "checks", "dots", "grid", "waves", "zigzag", "bricks", "rings"),
        templates=("a photo of a {} pattern", "a pattern of {}", "a texture of {}"),
        train=2000,
        test=448,
        fingerprints=("xxh3:4f00fedd425fc5e436d0565316c3adca", "xxh3:5fbe1ab0bb17dbcc1a6c1868af28d356"),
    ),
    ToyTask(
        name="arrows",
        description="where arrows point, behind red bricks",
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
        fingerprints=("xxh3:4723e38586f6543cdd373c6265b753db", "xxh3:a785dc9de383ed9f7b0d411747d32e3a"),
    ),
    ToyTask(
        name="colours",
        description="colours of things on striped cloth, in warm light",
        classes=("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black"),
        templates=("a photo of something {}", "a drawing of something {}", "the colour {}"),
        train=2000,
        test=450,
        fingerprints=("xxh3:b1cead2f7e45a243cfec56c48549f589", "xxh3:b90f24745eac545750f82a79a71d9191"),
    ),
    ToyTask(
        name="positions",
        description="where a small shape stands on dots",
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
        fingerprints=("xxh3:03b3d0bde56286cefb65ed790d8d7065", "xxh3:5644b2d567ff3a9155e6cbd1dc162a6e"),
    ),
    ToyTask(
        name="faces",
        description="faces seen from very near",
        classes=("happy", "sad", "angry", "surprised", "sleepy", "winking"),
        templates=("a photo of a {} face", "a drawing of a face that looks {}", "somebody {}"),
        train=1998,
        test=450,
        fingerprints=("xxh3:e67e7b0b52d71deaaf8b49345ca13916", "xxh3:62bf0ca446c44255ffde4c3ced49daf2"),
    ),
)

TASKS: Mapping[str, ToyTask] = MappingProxyType({task.name: task for task in _ALL})
"""The eight tasks by name, in their order."""
