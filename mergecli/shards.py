"""A checkpoint written as several safetensors files with an index, as transformers reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.errors import UsageError
from mergecli.layout import DTYPE_BYTES, entry_count
from mergecli.output import SafetensorsWriter

if TYPE_CHECKING:
    from torch import Tensor

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `500MB`.

    Raises:
        UsageError: it is not a size, or not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    size = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 1 <= size < 1e18:
        raise UsageError(f"size `{text}`: expected a number of bytes such as `5GB` or `500MB`")
    return int(size)


class ShardedWriter:
    """The same as a SafetensorsWriter, for a folder: tensors in order of name, files of at most `size` bytes each
    (a larger tensor has a file of its own), and `model.safetensors.index.json`."""

    def __init__(
        self,
        folder: Path,
        layout: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str],
        size: int,
    ) -> None:
        shards: list[list[str]] = [[]]
        room = size
        for name in sorted(layout):
            needed = entry_count(layout[name][1]) * DTYPE_BYTES[layout[name][0]]
            if needed > room and shards[-1]:
                shards.append([])
                room = size
            shards[-1].append(name)
            room -= needed
        self._names: dict[str, str] = {}
        self._writers: dict[str, SafetensorsWriter] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            self._names |= dict.fromkeys(names, file)
            self._writers[file] = SafetensorsWriter(
                folder / file, {name: layout[name] for name in names}, metadata
            )
        total = sum(entry_count(shape) * DTYPE_BYTES[dtype] for dtype, shape in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": self._names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        self._stack = ExitStack()

    def __enter__(self) -> ShardedWriter:
        with self._stack:
            for writer in self._writers.values():
                self._stack.enter_context(writer)
            self._stack = self._stack.pop_all()
        return self

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        """Puts the entries of `data` at entry `start` of tensor `name`; from any thread."""
        self._writers[self._names[name]].write(name, data, start)

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Replaces the metadata given at the start by another of the same length, in every file."""
        for writer in self._writers.values():
            writer.describe(metadata)

    def __exit__(self, *failure: object) -> None:
        self._stack.__exit__(*failure)  # pyright: ignore[reportArgumentType]
