"""Safetensors files written tensor by tensor: one, or several with an index as transformers reads them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from mergecli.storage.atomic import whole_file, write_text
from mergecli.storage.checksums import KEY, ChunkHashes, blank, checksums, chunk_bytes, chunk_count, digest_of
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
    (a larger tensor has a file of its own), and `model.safetensors.index.json`.

    The names of all files have the generation in them, a digest of the content: so shards of two models never have one
    name, and whoever has read an index finds the shards that it means, or none.
    """

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
        self._folder, self._layout, self._metadata = folder, layout, metadata
        self._shards: dict[str, int] = {name: number for number, names in enumerate(shards) for name in names}
        self._writers = [
            SafetensorsWriter(
                folder / f"shard-{number}.safetensors", {name: layout[name] for name in names}, metadata
            )
            for number, names in enumerate(shards)
        ]
        self.size = sum(writer.size for writer in self._writers)
        """Bytes of all files but the index."""
        self._pieces: dict[tuple[str, int], str] = {}
        self._stack = ExitStack()
        self.digest = ""
        """Of the content, as a checkpoint's; known when the folder is closed whole."""

    def __enter__(self) -> ShardedWriter:
        with self._stack:
            for writer in self._writers:
                self._stack.enter_context(writer)
            self._stack = self._stack.pop_all()
        return self

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        """Puts the entries of `data` at entry `start` of tensor `name`; from any thread."""
        import xxhash

        self._writers[self._shards[name]].write(name, data, start)
        self._pieces[name, start] = xxhash.xxh3_128_hexdigest(bytes_of(data))

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Replaces the metadata given at the start by another of the same length, in every file."""
        for writer in self._writers:
            writer.describe(metadata)
        self._metadata = metadata

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind is not None:
            return
        content = [sorted(self._metadata.items()), sorted(self._layout.items()), sorted(self._pieces.items())]
        generation = sha256(json.dumps(content).encode()).hexdigest()[:12]
        files = [
            f"model-{generation}-{number:05}-of-{len(self._writers):05}.safetensors"
            for number in range(1, len(self._writers) + 1)
        ]
        for writer, file in zip(self._writers, files, strict=True):
            writer.path.rename(self._folder / file)
        self.digest = digest_of(self._layout, lambda name: self._writers[self._shards[name]].hashes)
        total = sum(entry_count(shape) * DTYPE_BYTES[dtype] for dtype, shape in self._layout.values())
        index = {
            "metadata": {"generation": generation, "total_size": total},
            "weight_map": {name: files[number] for name, number in self._shards.items()},
        }
        write_text(self._folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], *, checked: bool = False
) -> None:
    """Writes tensors that are in memory as one safetensors file, with checksums if it is to be `checked` when it is read."""
    layout = {
        name: (SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    with SafetensorsWriter(path, layout, metadata, checked=checked) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


class SafetensorsWriter:
    """A safetensors file written tensor by tensor, in any order and in blocks, byte for byte as
    `safetensors.torch.save_file` writes the same content; it takes its name when closed whole.

    `layout` gives dtype and shape of every tensor before the first is written: the header comes first.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str],
        *,
        checked: bool = False,
    ) -> None:
        """`checked` adds checksums to the metadata, which are compared whenever the file is read."""
        self.hashes, self._checked = ChunkHashes(), checked
        self.digest = ""
        """Of the content, as a checkpoint's; known when the file is closed whole."""
        self._layout, self._metadata = layout, metadata
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
        self._header = self._header_with(blank(layout))
        self.size = len(self._header) + offset
        """Bytes of the file."""
        self.path = path

    def __enter__(self) -> SafetensorsWriter:
        self._file = self._whole.__enter__()
        try:
            descriptor = self._file.fileno()
            with contextlib.suppress(AttributeError):
                _reserve(descriptor, self.size)
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
        dtype, shape = self._layout[name]
        total = entry_count(shape) * DTYPE_BYTES[dtype]
        self.hashes.feed(name, start * data.element_size(), buffer, chunk_bytes(dtype), total)
        with self._lock:
            self._left[name] -= len(buffer)

    def _header_with(self, text: str) -> bytes:
        """The header; of a checked file with these checksums."""
        more = {KEY: text} if self._checked else {}
        return header_bytes({**self._metadata, **more}, self._tensors)

    def _hash(self) -> None:
        """Makes the digest and the checksums of what was written; what was not written in order is read again for them."""
        hashes = self.hashes
        placed = {
            name: (dtype, shape, len(self._header) + self._starts[name])
            for name, (dtype, shape) in self._layout.items()
        }
        for name, (dtype, shape, first) in placed.items():
            size, total = chunk_bytes(dtype), entry_count(shape) * DTYPE_BYTES[dtype]
            for chunk in range(chunk_count(shape)):
                if not hashes.is_whole(name, chunk):
                    start = chunk * size
                    piece = os.pread(self._file.fileno(), min(size, total - start), first + start)
                    hashes.feed(name, start, memoryview(piece), size, total)
        self.digest = digest_of(self._layout, lambda _: hashes)
        if self._checked:
            header = self._header_with(checksums(placed, self._metadata, hashes))
            os.pwrite(self._file.fileno(), header, 0)

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Replaces the metadata given at the start by another of the same length, such as digests now known."""
        self._metadata = metadata
        header = self._header_with(blank(self._layout))
        if len(header) != len(self._header):
            raise ValueError("the new metadata has another length")
        os.pwrite(self._file.fileno(), header, 0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                if missing := [name for name, left in self._left.items() if left]:
                    raise RuntimeError(f"{self.path}: tensors not written whole: {missing[:5]}")
                self._hash()
            except BaseException as stopped:
                self._whole.__exit__(type(stopped), stopped, stopped.__traceback__)
                raise
        self._whole.__exit__(kind, error, trace)


def _reserve(descriptor: int, size: int) -> None:
    """Claims the space on the disk at once, so that a full disk is found before the work, not after it."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)
