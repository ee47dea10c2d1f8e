"""Checkpoints whose tensors are computed while they are read, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mergecli.storage.checkpoint import Checkpoint, TensorEntry
from mergecli.storage.checksums import ChunkHashes
from mergecli.storage.safetensors_format import DTYPE_BYTES, SAFETENSORS_NAMES, TORCH_NAMES

if TYPE_CHECKING:
    from torch import Tensor

BlockReader = Callable[[int, int, "Tensor"], object]
"""`read(start, stop, into)` writes the entries [start, stop) of a flattened tensor into `into`, rounded to its dtype;
from any thread, and the same values however the tensor is cut into blocks."""


@dataclass(frozen=True)
class LazyCheckpoint(Checkpoint):
    """A checkpoint that is computed from others; its digest is that of a file with the same content.

    The `file` of an entry is its index in `readers`.
    """

    readers: tuple[BlockReader, ...]
    sources: tuple[Checkpoint, ...]
    """What it is computed from; closed with it."""
    stored: Checkpoint | None = None
    """The checkpoint whose size it has, where that is not what its own dtypes would make it."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, in the dtypes of `stored`."""
        return super().nbytes if self.stored is None else self.stored.nbytes

    def _read_bytes(self, entry: TensorEntry, offset: int, buffer: memoryview) -> None:
        import torch

        into = torch.frombuffer(buffer, dtype=getattr(torch, TORCH_NAMES[entry.dtype]))
        start = offset // DTYPE_BYTES[entry.dtype]
        self.readers[entry.file](start, start + len(into), into)

    def expect_unchanged(self) -> None:
        """Raises InputError if a file that it is computed from has changed since it was opened."""
        for source in self.sources:
            source.expect_unchanged()

    def close(self) -> None:
        """Closes the files that it is computed from."""
        for source in self.sources:
            source.close()


def lazy_checkpoint(
    base: Checkpoint,
    readers: Mapping[str, BlockReader],
    *,
    dtype: str | None = None,
    path: Path | None = None,
    metadata: Mapping[str, str] | None = None,
    others: tuple[Checkpoint, ...] = (),
    stored: Checkpoint | None = None,
) -> LazyCheckpoint:
    """The base with some of its tensors computed by `readers`, and floating point tensors rounded to `dtype`.

    Args:
        dtype: a torch name such as `float16`; by default every tensor keeps the base's own.
        path: what messages call it; by default the base's.
        metadata: what it says of itself; by default what the base does.
        others: checkpoints besides the base that `readers` read.
        stored: the checkpoint whose size it has; by default its own dtypes make it.
    """
    wanted = SAFETENSORS_NAMES[dtype] if dtype else None
    entries: dict[str, TensorEntry] = {}
    every: list[BlockReader] = []
    for number, (name, entry) in enumerate(base.entries.items()):
        own = wanted if wanted and entry.is_float else entry.dtype
        entries[name] = TensorEntry(own, entry.shape, number, 0)
        unchanged = partial(base.read_entries, name) if own == entry.dtype else partial(_round, base, name)
        every.append(readers.get(name, unchanged))
    sources = (base, *others)
    return LazyCheckpoint(
        path=path or base.path,
        entries=entries,
        metadata=base.metadata if metadata is None else metadata,
        files=tuple(file for source in sources for file in source.files),
        descriptors=(),
        hashes=ChunkHashes(),
        states=(),
        readers=tuple(every),
        sources=sources,
        stored=stored,
    )


def rounded(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The checkpoint with its floating point tensors rounded to `dtype`, a torch name, as they are read."""
    wanted = SAFETENSORS_NAMES[dtype]
    if all(entry.dtype == wanted for entry in checkpoint.entries.values() if entry.is_float):
        return checkpoint
    return lazy_checkpoint(checkpoint, {}, dtype=dtype)


def _round(base: Checkpoint, name: str, start: int, stop: int, into: Tensor) -> None:
    into.copy_(base.read_entries(name, start, stop))
