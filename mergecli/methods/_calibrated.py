"""Methods that measure statistics of each model, on images of its own task, before they merge."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from mergecli.methods._base import DataDriven, Group, Groups, Method, total
from mergecli.methods._settings import Range

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor -> shape, of every tensor that is merged."""
Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor -> dtype (as safetensors call it) and shape, of everything that is measured."""


class Activations(Protocol):
    """(B, S, D) activations between two layers, of all images of a task, batch by batch; kept on disk."""

    def look(self, layer: Module, /) -> None:
        """Sends them through the layer and drops its output: hooks see what goes in."""
        ...

    def step(self, layer: Module, /) -> None:
        """Replaces them by the layer's output."""
        ...

    def batches(self) -> Iterator[Tensor]:
        """The activations as they are now, where the model is."""
        ...


class Probe(Protocol):
    """One task's model and images, as a method sees them; there is no way to ask for labels."""

    @property
    def model(self) -> Module:
        """The vision tower with the task's weights; its parameters have the names that groups have."""
        ...

    def batches(self, size: int, /) -> Iterator[Tensor]:
        """(B, 3, H, W) the task's images, `size` at a time, where the model is."""
        ...

    def logits(self, pixel_values: Tensor, /) -> Tensor:
        """(B, C) logits of the task's zero-shot head."""
        ...

    def features(self, pixel_values: Tensor, /) -> Tensor:
        """(B, D) unit features."""
        ...

    @property
    def projection(self) -> Tensor:
        """(D, W) the CLIP's visual projection, of which features are made."""
        ...

    def layers(self) -> Iterator[tuple[str, Module]]:
        """Name and module of each transformer layer, from the first to the last."""
        ...

    def behind(self) -> Iterator[tuple[str, Module]]:
        """The same of what comes behind them: a module with the visual projection, under an empty name; nothing where that is
        not merged."""
        ...

    def activations(self, size: int, /) -> Activations:
        """The inputs of the first layer, `size` images in a batch."""
        ...


class JointProbe(Protocol):
    """The images of all tasks, a tower for merged weights, and the weights of every model."""

    @property
    def tasks(self) -> int:
        """T."""
        ...

    @property
    def model(self) -> Module:
        """The vision tower; its parameters have the names that groups have."""
        ...

    def tuned(self, task: int, name: str, /) -> Tensor:
        """(...) float32 weights of a task's model."""
        ...

    def base(self, name: str, /) -> Tensor:
        """(...) float32 weights of the base."""
        ...

    def layers(self) -> Iterator[tuple[str, Module]]:
        """Name and module of each transformer layer, from the first to the last."""
        ...

    def behind(self) -> Iterator[tuple[str, Module]]:
        """As of a `Probe`."""
        ...

    def activations(self, task: int, size: int, /) -> Activations:
        """The inputs of the first layer for the images of a task, by the weights that the model has now."""
        ...


class Statistics(Protocol):
    """Measured statistics, read piece by piece: a file a task, or one file of all tasks if they are measured together."""

    @property
    def names(self) -> Collection[str]:
        """The names of a file's tensors."""
        ...

    def read(self, file: int, name: str, start: int = 0, stop: int | None = None, /) -> Tensor:
        """(stop - start,) entries of a flattened tensor of file number `file`."""
        ...


@dataclass(frozen=True)
class Calibrated(DataDriven):
    """What such methods share: statistics are measured once for each task, and kept as files."""

    kind = "a few images"
    kept_as = "statistics"
    looks_at: ClassVar[str] = "training images of every task, unlabeled"
    measured_as: ClassVar[str] = ""
    """The method that measures the same, whose statistics serve this one too; by default its own name."""
    of_base: ClassVar[bool] = False
    """Whether the base is measured on each task's images, in place of the task's own model."""
    joint: ClassVar[bool] = False
    """Whether all tasks are measured together, into one file of statistics."""
    merge_time: ClassVar[frozenset[str]] = frozenset({"exclude"})

    examples: Annotated[int, Range(1)] = 256
    """Images of each task that are looked at, without labels; all where a task has fewer. Where it is no multiple of
    `batch_size` the last batch is smaller; FusionBench finishes that batch, and so looks at more images."""
    batch_size: Annotated[int, Range(1)] = 32
    """Images in a batch."""
    split: str = "train"
    """The split that the images are taken from: `train`, `validation`, `test`, or another that the data have."""
    shuffle: bool = True
    """Whether the images are drawn by the recipe's seed, or the first ones as they are stored."""
    exclude: tuple[str, ...] = ()
    """Tensors that keep the base's values: regular expressions that match the beginning of their names."""

    @classmethod
    def check(cls, tasks: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[str, str]]:
        del tasks
        found: list[tuple[str, str]] = []
        for pattern in settings.get("exclude", ()):
            try:
                re.compile(pattern)
            except re.error as error:
                found.append(("exclude", f"`{pattern}` is not a regular expression: {error}"))
        return found

    def excludes(self, name: str) -> bool:
        """Whether a tensor keeps the base's values."""
        return any(re.match(pattern, name) for pattern in self.exclude)

    @property
    def rounds(self) -> int:
        """How often measuring goes over the images, for those that learn from them; a trial does so once."""
        return 1

    def trial(self) -> Calibrated:
        """The same with one round, to know how long each takes."""
        return self

    def layout(self, shapes: Shapes, /) -> Layout:
        """The statistics of a model with these tensors."""
        raise NotImplementedError

    def measure(self, probe: Probe, /) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of the layout, of one task."""
        raise NotImplementedError

    def measure_jointly(self, probe: JointProbe, /) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of the layout, of all tasks together; for those that are `joint`."""
        raise NotImplementedError

    def survey_with(self, groups: Groups, learned: Statistics, /) -> Any:
        """What `merge` gets in place of the statistics, for methods that must survey the whole model with them."""
        del groups
        return learned

    def merge(self, group: Group, learned: Any, /) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class MayMeasure(Method):
    """Methods that look at images before they merge only if a setting says so."""

    about_images: ClassVar[frozenset[str]] = frozenset()
    """The settings that say whether, and at which. They are those of the whole model."""

    @property
    def support(self) -> Calibrated | None:
        """What measures the statistics; None if the settings need none."""
        raise NotImplementedError


def measured_by(method: Method) -> Calibrated | None:
    """What measures the statistics that a method needs; None if it needs none."""
    if isinstance(method, Calibrated):
        return method
    return method.support if isinstance(method, MayMeasure) else None


def mean(group: Group) -> Tensor:
    """(...) the plain mean of the fine-tuned weights, as `average` has it."""
    return total(group.tuned).div_(group.tasks)


def fill(module: Module, values: Mapping[str, Tensor]) -> None:
    """Puts (...) values in the place of a module's parameters of their names; the other parameters stay."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in values:
                parameter.copy_(values[name])
