"""Routes: to which experts a tower that routes sends each task's images, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.results.tables import csv_text
from mergecli.storage.atomic import write_text

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, tuple[float, ...]]
"""Layer -> mean weight of each of T experts."""


class RouteSums:
    """Routing weights of one tower on one task, summed over the images that it has seen."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._images = 0

    def add(self, routes: Mapping[str, Tensor], images: int) -> None:
        """Adds layer -> (B, T) weights of B images, or (1, T) weights that all of them shared."""
        for layer, weights in routes.items():
            # (T,); it stays on its device: to read it would wait for the device after every layer
            added = weights.detach().double().mean(0).mul_(images)
            self._sums[layer] = self._sums[layer] + added if layer in self._sums else added
        self._images += images

    def means(self) -> Weights:
        """Means over the images."""
        return {layer: tuple((each / self._images).tolist()) for layer, each in self._sums.items()}


@dataclass(frozen=True)
class Routes:
    """The routes of one tower."""

    name: str
    experts: tuple[str, ...]
    tasks: Mapping[str, Weights]
    """Task of the images -> layer -> mean weight of each expert."""

    def to_csv(self) -> str:
        """A row for each task and layer: task, layer, and a column for each expert; numbers in full."""
        rows = [
            [task, layer, *weights]
            for task, layers in self.tasks.items()
            for layer, weights in layers.items()
        ]
        return csv_text([["task", "layer", *self.experts], *rows], repr)


def route_files(folder: Path, name: str) -> tuple[Path, Path]:
    """The table of a tower's routes, and the picture."""
    return folder / f"{name}.csv", folder / f"{name}.png"


def write_routes(routes: Sequence[Routes], folder: Path) -> None:
    """Writes the table of each tower."""
    for each in routes:
        write_text(route_files(folder, each.name)[0], each.to_csv())
