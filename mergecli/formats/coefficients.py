"""The coefficients that a method learned: those in their own file, and those that a merged checkpoint was made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.methods._depth import parts_of
from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import Checkpoint, open_checkpoint
from mergecli.storage.metadata import inputs_of
from mergecli.storage.store import home

if TYPE_CHECKING:
    from mergecli.results.tables import Table

KIND = "coefficients"
"""The `kind` of the files, the key of the tensor in them, the input of a merged file, and their folder in the store."""


@dataclass(frozen=True)
class Coefficients:
    """How much of each task vector was added."""

    tasks: tuple[str, ...]
    tensors: Mapping[str, tuple[float, ...]]
    """Tensor -> a coefficient for each task. One entry, called `all`, where all tensors have the same."""

    def layers(self) -> dict[str, tuple[float, ...]]:
        """Part of the network -> mean coefficient of its tensors for each task: layers by number, `before` and `after` them."""
        parts = {"all": "all"} if [*self.tensors] == ["all"] else parts_of(self.tensors)
        rows = {
            part: [self.tensors[name] for name in parts if parts[name] == part] for part in parts.values()
        }
        return {
            part: tuple(sum(column) / len(column) for column in zip(*own, strict=True))
            for part, own in rows.items()
        }

    def table(self) -> Table:
        """A row for each part of the network, a column for each task."""
        from mergecli.results.cells import Column
        from mergecli.results.tables import Table

        columns = (Column("layer"), *(Column(task, "number") for task in self.tasks))
        return Table(columns, tuple((part, *values) for part, values in self.layers().items()))

    def plot(self, path: Path) -> None:
        """Draws a heat-map, tasks by parts of the network."""
        from mergecli.results.plots import heat_map

        layers = self.layers()
        values = [[own[index] for own in layers.values()] for index in range(len(self.tasks))]
        heat_map(self.tasks, values, path, columns=[*layers], label="mean coefficient", x_label="layer")


def coefficients_of(stored: Checkpoint) -> Coefficients | None:
    """The coefficients in a file of them, or those of the store that a merged file was made with; None if there are none.

    Raises:
        InputError: the file is damaged.
    """
    if stored.metadata.get("kind") == KIND:
        return _read(stored)
    digest = inputs_of(stored.metadata).get(KIND)
    folder = home() / KIND / Path(stored.metadata.get("method", "")).name
    for path in sorted(folder.glob("*.safetensors")) if digest else ():
        try:
            with open_checkpoint(path) as each:
                if KIND in each.entries and each.digest() == digest:
                    return _read(each)
        except InputError:
            continue  # another one, which is damaged or has just gone
    return None


def _read(stored: Checkpoint) -> Coefficients | None:
    if KIND not in stored.entries:
        return None  # the method learned something else
    try:
        tasks: Any = json.loads(stored.metadata["tasks"])
        names: Any = json.loads(stored.metadata["tensors"])
        table = stored.read(KIND)  # (T, P) or (T, 1)
        names = names if table.shape[1] > 1 or len(names) == 1 else ["all"]
        columns = zip(names, table.T.tolist(), strict=True)
        values = {str(name): tuple(own) for name, own in columns}
        assert len(tasks) == len(table)
    except (KeyError, ValueError, TypeError, IndexError, AssertionError, RecursionError) as error:
        raise InputError(f"{stored.path}: is not what its metadata says") from error
    return Coefficients(tuple(map(str, tasks)), values)
