"""A tensor of a checked file, mapped into memory: every chunk is compared with its checksum before it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergecli.storage.checkpoint import Checkpoint
from mergecli.storage.checksums import DamagedFileError

if TYPE_CHECKING:
    from torch import Tensor


class MappedTensor:
    """The tensor `name` of an open checkpoint that has checksums; it may be closed when this is made.

    What is written to the tensor changes the memory only, not the file.
    """

    def __init__(self, stored: Checkpoint, name: str) -> None:
        import numpy as np
        import torch

        entry = stored.entries[name]
        # copy on write: torch warns of arrays that it must not write to
        mapped: Any = np.memmap(
            stored.files[entry.file], np.uint8, mode="c", offset=entry.start, shape=(entry.nbytes,)
        )
        self._memory, self._entry, self._name = memoryview(mapped), entry, name
        self._hashes = stored.hashes
        self._known = bytearray(-(-entry.nbytes // entry.chunk))
        self.tensor: Tensor = torch.from_numpy(mapped).view(entry.shape)

    def damage(self, start: int, stop: int) -> tuple[DamagedFileError, list[range]] | None:
        """The ranges of bytes between `start` and `stop`, widened to whole chunks, that are not what was written; None if
        all are. Each chunk is looked at once; who asks mends those that are found."""
        size = self._entry.chunk
        chunks = range(start // size, -(-stop // size))
        if all(self._known[chunks.start : chunks.stop]):
            return None
        error: DamagedFileError | None = None
        found: list[range] = []
        for chunk in chunks:
            if self._known[chunk]:
                continue
            first, last = chunk * size, min((chunk + 1) * size, len(self._memory))
            try:
                self._hashes.feed(self._name, first, self._memory[first:last], size, len(self._memory))
            except DamagedFileError as damaged:
                error = damaged
                found.append(range(first, last))
            self._known[chunk] = 1
        return (error, found) if error else None
