"""The safetensors format: its dtypes, and its headers written, read and checked."""

from __future__ import annotations

import json
import os
import shlex
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli.runtime.errors import InputError
from mergecli.storage.sources import is_safe

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
"""Bytes per entry of each safetensors dtype, in the order in which the format sorts them (last first)."""

TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64",
    "U64": "uint64",
}  # fmt: skip
"""safetensors dtype -> the name of the torch dtype."""

SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
"""The name of a torch dtype -> the safetensors dtype."""

FLOATS = ("F16", "BF16", "F32", "F64")
"""The dtypes that are merged; tensors of any other dtype must be equal in all models and are copied."""

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""

_OTHER_FILES = {
    ".json": "`mergecli report` reads results",
    ".toml": "a recipe is named alone, or with `--recipe`",
    ".yaml": "a recipe is a TOML file",
    ".yml": "a recipe is a TOML file",
}
"""Suffix of another kind of file -> what that is good for."""
_AGAIN = "the copy or download did not finish: fetch it again"


def pickle_hint(path: Path) -> str:
    """How to read a pickle."""
    command = f"mergecli fetch --allow-pickle {shlex.quote(str(path))}"
    return f"a pickle may run any code when opened: `{command}` takes only the tensors out of it, into safetensors"


def entry_count(shape: tuple[int, ...]) -> int:
    """The number of entries of a tensor of this shape (1 for a 0-d tensor)."""
    count = 1
    for size in shape:
        count *= size
    return count


def layout_size(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of tensors of these dtypes and shapes together."""
    return sum(entry_count(shape) * DTYPE_BYTES[dtype] for dtype, shape in layout.values())


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's entries in order; of a contiguous tensor its own memory, to be read into."""
    import torch

    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def shards_of(index: str | bytes) -> list[str]:
    """The files that an index of shards names, sorted.

    Raises:
        ValueError: it is no such index.
    """
    try:
        names: set[Any] = set(json.loads(index)["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError("no readable `weight_map`") from None
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError("`weight_map` does not name files")
    if outside := sorted(name for name in names if not is_safe(name)):
        raise ValueError(f"`weight_map` names `{outside[0]}`, which does not lie beside the index")
    return sorted(names)


def open_regular(file: Path) -> int:
    """A descriptor of the file, to read from anywhere in it.

    A pipe that nobody writes to would keep a plain `open` waiting forever, so it is opened without waiting and refused.

    Raises:
        InputError: it cannot be opened, or is a folder, a pipe or a device.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise InputError(f"{file}: cannot open: {(error.strerror or '').lower()}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise InputError(f"{file}: is {_what(mode)}, a file was expected", _REGULAR)
    return descriptor


_REGULAR = "tensors are read from many places of a file: copy them to a file, and name that"


def _what(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device"


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys are each there once: of two, json would keep the last, and other readers the first."""
    table = dict(pairs)
    if len(table) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _TwiceError(key)
    return table


class _TwiceError(Exception):
    """The key that stands twice in a JSON object."""


def generation_of(index: str | bytes) -> str:
    """What the names of all shards of an index have in common, so that no other model has shards of their names; empty
    where the index does not say."""
    try:
        found: Any = json.loads(index)["metadata"]["generation"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""


def header_bytes(metadata: Mapping[str, str], tensors: Mapping[str, object]) -> bytes:
    """The first bytes of a safetensors file: the length of the header, and the header padded to 8 bytes."""
    about = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    text = json.dumps({**about, **tensors}, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(
    file: Path, descriptor: int
) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], dict[str, str]]:
    """Tensors (dtype, shape, first byte in the file) and metadata of one safetensors file, checked against its size.

    Raises:
        InputError: it is no safetensors file, or damaged.
    """
    size = os.fstat(descriptor).st_size
    start = os.pread(descriptor, 64, 0)
    pickled = start[:2] in (
        b"\x80\x02",
        b"\x80\x03",
        b"\x80\x04",
        b"\x80\x05",
    )  # or a header of 640 bytes, ...
    if start[:4] == b"PK\x03\x04" or (pickled and start[8:9] != b"{"):
        raise InputError(f"{file}: is a pickle, which is not opened as it is", pickle_hint(file))
    if start.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{file}: is a Git LFS pointer, not the weights", "run `git lfs pull` in that repository"
        )
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or (size < 8 + length and start[8:9] != b"{") or length > MAX_HEADER:
        raise InputError(
            f"{file}: is empty, a safetensors file was expected"
            if size == 0
            else f"{file}: is not a safetensors file",
            _AGAIN if size == 0 else _OTHER_FILES.get(file.suffix, ""),
        )
    if size < 8 + length:
        raise InputError(
            f"{file}: is cut short: its header takes {length:,} bytes, the file has {size:,}", _AGAIN
        )
    try:
        header: Any = json.loads(os.pread(descriptor, length, 8), object_pairs_hook=_once)
        metadata: Any = header.pop("__metadata__", {})
        tensors = {
            str(name): (
                str(entry["dtype"]),
                tuple(map(int, entry["shape"])),
                tuple(map(int, entry["data_offsets"])),
            )
            for name, entry in header.items()
        }
        "".join(tensors).encode()  # a name that is no text cannot be written again
        about = {str(key): str(value) for key, value in metadata.items()}
    except _TwiceError as error:
        raise InputError(
            f"{file}: is damaged: `{str(error)[:200]}` stands twice in its header", "write the file again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"{file}: is not a safetensors file: its header cannot be read") from error
    end = 0
    for name, (dtype, shape, offsets) in sorted(tensors.items(), key=lambda item: item[1][2]):
        if dtype not in DTYPE_BYTES:
            raise InputError(f"{file}: `{name}` has dtype {dtype}, which mergecli does not know")
        if len(offsets) != 2 or min(shape, default=0) < 0 or offsets[0] != end:
            raise InputError(f"{file}: is damaged: `{name}` does not begin where the tensor before it ends")
        if offsets[1] - offsets[0] != entry_count(shape) * DTYPE_BYTES[dtype]:
            raise InputError(f"{file}: is damaged: the size of `{name}` does not fit its shape {shape}")
        end = offsets[1]
    if size < 8 + length + end:
        short = 8 + length + end - size
        raise InputError(f"{file}: is cut short: {short:,} of {8 + length + end:,} bytes are missing", _AGAIN)
    if size > 8 + length + end:
        raise InputError(
            f"{file}: is damaged: {size - 8 - length - end:,} bytes after the last tensor", _AGAIN
        )
    return {name: (dtype, shape, 8 + length + at[0]) for name, (dtype, shape, at) in tensors.items()}, about
