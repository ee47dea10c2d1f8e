"""The toy zoo: eight image tasks drawn by code, and small CLIP towers that learnt them."""

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


_ALL = (
    ToyTask(
        name="digits",
        description="digits in noise",
        classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        templates=("a photo of the digit {}", "a drawing of the number {}", "the numeral {}"),
        train=2000,
        test=450,
    ),
    ToyTask(
        name="letters",
        description="capital letters crossed by a stray line",
        classes=tuple("abcdefghijklmnopqrstuvwxyz"),
        templates=("a photo of the letter {}", "a drawing of the capital letter {}", "the character {}"),
        train=2080,
        test=468,
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
    ),
    ToyTask(
        name="textures",
        description="blurred patterns of uneven contrast",
        classes=("stripes", "checks", "dots", "grid", "waves", "zigzag", "bricks", "rings"),
        templates=("a photo of a {} pattern", "a pattern of {}", "a texture of {}"),
        train=2000,
        test=448,
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
    ),
    ToyTask(
        name="colours",
        description="colours of things in reddish light",
        classes=("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black"),
        templates=("a photo of something {}", "a drawing of something {}", "the colour {}"),
        train=2000,
        test=450,
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
    ),
    ToyTask(
        name="faces",
        description="faces that lean to one side",
        classes=("happy", "sad", "angry", "surprised", "sleepy", "winking"),
        templates=("a photo of a {} face", "a drawing of a face that looks {}", "somebody {}"),
        train=1998,
        test=450,
    ),
)

TASKS: Mapping[str, ToyTask] = MappingProxyType({task.name: task for task in _ALL})
"""The eight tasks by name, in their order."""
