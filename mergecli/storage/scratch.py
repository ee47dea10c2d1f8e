"""Files without a name for what does not fit in memory: they vanish when the work ends or the program dies."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mergecli.storage.atomic import write_errors
from mergecli.storage.safetensors_format import bytes_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Scratch:
    """The folder of such files, which are open until `stack` ends."""

    folder: Path
    stack: ExitStack
    in_memory: bool = False
    """Whether they are in memory and no files at all: a dry run writes nothing."""

    def file(self) -> IO[bytes]:
        """A new one, to write and read."""
        if self.in_memory:
            return self.stack.enter_context(_memory_file())
        with write_errors(self.folder):
            return self.stack.enter_context(tempfile.TemporaryFile(dir=self.folder))


def _memory_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("mergecli"), "w+b")
    return tempfile.TemporaryFile()


class TensorShelf:
    """Float32 tensors in such a file, by name."""

    def __init__(self, scratch: Scratch) -> None:
        self._folder, self._file = scratch.folder, scratch.file()
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0

    def put(self, name: str, value: Tensor, /) -> None:
        """Keeps a tensor.

        Raises:
            InputError: the disk is full.
        """
        with write_errors(self._folder):
            self._file.seek(self._end)
            self._file.write(bytes_of(value.detach().cpu().contiguous()))
            self._file.flush()
        self._places[name] = self._end, value.numel()
        self._end = self._file.tell()

    def get(self, name: str, /) -> Tensor:
        """(n,) its entries; several threads may ask at once."""
        import torch

        start, count = self._places[name]
        values = torch.empty(count)
        into, read = memoryview(bytes_of(values)).cast("B"), 0
        while read < len(into):
            read += os.preadv(self._file.fileno(), [into[read:]], start + read)
        return values
