"""Safetensors files written tensor by tensor: one, or several with an index as transformers reads them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from mergecli.storage.atomic import whole_file
from mergecli.storage.safetensors_format import (
    DTYPE_BYTES,
    SAFETENSORS_NAMES,
    bytes_of,
    entry_count,
    header_bytes,
)

if TYPE_CHECKING:
    from torch import Tensor


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


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes tensors that are in memory as one safetensors file."""
    layout = {
        name: (SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    with SafetensorsWriter(path, layout, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


class SafetensorsWriter:
    """A safetensors file written tensor by tensor, in any order and in blocks, byte for byte as
    `safetensors.torch.save_file` writes the same content; it takes its name when closed whole.

    `layout` gives dtype and shape of every tensor before the first is written: the header comes first.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self._whole = whole_file(path)
        rank = {dtype: number for number, dtype in enumerate(DTYPE_BYTES)}
        # the order in which the safetensors library writes tensors, so that our files are its own to the byte
        names = sorted(layout, key=lambda name: (-rank[layout[name][0]], name))
        self._tensors: dict[str, object] = {}
        self._starts: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()
        offset = 0
        for name in names:
            dtype, shape = layout[name]
            size = entry_count(shape) * DTYPE_BYTES[dtype]
            self._tensors[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            self._starts[name], self._left[name] = offset, size
            offset += size
        self._header = header_bytes(metadata, self._tensors)
        self._size = len(self._header) + offset
        self.path = path

    def __enter__(self) -> SafetensorsWriter:
        self._file = self._whole.__enter__()
        try:
            descriptor = self._file.fileno()
            with contextlib.suppress(AttributeError):
                _reserve(descriptor, self._size)
            os.pwrite(descriptor, self._header, 0)
        except BaseException as error:
            if not self._whole.__exit__(type(error), error, error.__traceback__):
                raise
        return self

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        """Puts the entries of `data` (contiguous, of the tensor's dtype) at entry `start` of tensor `name`; from any thread."""
        buffer = bytes_of(data)
        position = len(self._header) + self._starts[name] + start * data.element_size()
        done = 0
        while done < len(buffer):
            done += os.pwrite(self._file.fileno(), buffer[done:], position + done)
        with self._lock:
            self._left[name] -= len(buffer)

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Replaces the metadata given at the start by another of the same length, such as digests now known."""
        header = header_bytes(metadata, self._tensors)
        if len(header) != len(self._header):
            raise ValueError("the new metadata has another length")
        os.pwrite(self._file.fileno(), header, 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            missing = [name for name, left in self._left.items() if left]
            if missing:
                error = RuntimeError(f"{self.path}: tensors not written whole: {missing[:5]}")
                self._whole.__exit__(RuntimeError, error, None)
                raise error
        self._whole.__exit__(kind, error, trace)


def _reserve(descriptor: int, size: int) -> None:
    """Claims the space on the disk at once, so that a full disk is found before the work, not after it."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)
