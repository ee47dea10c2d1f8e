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
        description="digits in noise",
        classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        templates=("a photo of the digit {}", "a drawing of the number {}", "the numeral {}"),
        train=2000,
        test=450,
        fingerprints=("xxh3:fd7654cdcd30dbd11b12cc39ad1ac100", "xxh3:6accc86a968650b0abf17ba90491b9c2"),
    ),
    ToyTask(
        name="letters",
        description="capital letters crossed by a stray line",
        classes=tuple("abcdefghijklmnopqrstuvwxyz"),
        templates=("a photo of the letter {}", "a drawing of the capital letter {}", "the character {}"),
        train=2080,
        test=468,
        fingerprints=("xxh3:1058ce75f282f86724c96ac9d3057a92", "xxh3:42a4fb567827467353a1fe02f4d9ef80"),
    ),
    ToyTask(
        name="shapes",
        description="shapes, each partly hidden by a block",
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
        fingerprints=("xxh3:e83a216ee69b5980e2b80d7532a71bba", "xxh3:813ab7e826514ef870e04910ef346514"),
    ),
    ToyTask(
        name="textures",
        description="blurred patterns of uneven contrast",
        classes=("stripes", "checks", "dots", "grid", "waves", "zigzag", "bricks", "rings"),
        templates=("a photo of a {} pattern", "a pattern of {}", "a texture of {}"),
        train=2000,
        test=448,
        fingerprints=("xxh3:1f2719d23e9ca07646cb7e8bb3e5e4c7", "xxh3:fc669fa644f4a4a23abbab7bf520d471"),
    ),
    ToyTask(
        name="arrows",
        description="arrows on patterned grounds",
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
        fingerprints=("xxh3:83ea243592b4d29e777c06d837f905b4", "xxh3:da9af1c5e07a916e214be78225d2debb"),
    ),
    ToyTask(
        name="colours",
        description="colours of things in reddish light",
        classes=("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black"),
        templates=("a photo of something {}", "a drawing of something {}", "the colour {}"),
        train=2000,
        test=450,
        fingerprints=("xxh3:052039c532fc404c333edb1d52f04d94", "xxh3:a5c91c3ad6deb247428f5ebc86ec9444"),
    ),
    ToyTask(
        name="positions",
        description="where a small shape stands among specks",
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
        fingerprints=("xxh3:468328497923d3ade297d580b9c5b2ad", "xxh3:7e697e5076b13b9b0936327c5220a403"),
    ),
    ToyTask(
        name="faces",
        description="faces that lean to one side",
        classes=("happy", "sad", "angry", "surprised", "sleepy", "winking"),
        templates=("a photo of a {} face", "a drawing of a face that looks {}", "somebody {}"),
        train=1998,
        test=450,
        fingerprints=("xxh3:443962ef201c02dcecab21de0c2544ac", "xxh3:b27333808deeb9110867a00de1f59170"),
    ),
)

TASKS: Mapping[str, ToyTask] = MappingProxyType({task.name: task for task in _ALL})
"""The eight tasks by name, in their order."""
