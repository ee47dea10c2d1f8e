"""Towers some of whose linear layers route, and the layers that were there before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class RoutedLinears:
    """What such towers share: nothing of their routing is learned by descent, and each layer decides for itself."""

    tower: nn.Module
    replaced: Mapping[str, nn.Linear]
    """The layer's path in the tower -> the tower's own layer."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Nothing: the routing follows from what is in the file."""
        return {}

    @property
    def chosen(self) -> None:
        """Nothing: layers decide for themselves."""
        return None

    def remove(self) -> None:
        """Puts the tower's own layers back."""
        for path, linear in self.replaced.items():
            put(self.tower, path, linear)


def put(tower: nn.Module, path: str, layer: nn.Module) -> None:
    """Makes a layer the tower's submodule at `path`."""
    parent, _, child = path.rpartition(".")
    setattr(tower.get_submodule(parent), child, layer)
