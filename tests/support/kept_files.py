"""Files as mergecli keeps them, changed on purpose: by hand, or as a disk does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mergecli.storage.checksums import KEY
from mergecli.storage.safetensors_writer import save_tensors


def save_checked(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, Any]) -> None:
    """Writes the file with the checksums of what is in it."""
    about = {key: value for key, value in metadata.items() if key != KEY}
    save_tensors({name: each.contiguous() for name, each in tensors.items()}, file, about, checked=True)


def flip(file: Path, bit: int) -> None:
    """Changes one bit of the file where it lies."""
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        (byte,) = opened.read(1)
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))
