"""Files that appear whole or not at all: text, and safetensors written tensor by tensor."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from mergecli.errors import InputError, UsageError
from mergecli.layout import DTYPE_BYTES, bytes_of, entry_count, header_bytes

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def write_errors(path: Path) -> Generator[None]:
    """Turns the operating system's refusals into one clear error about `path`."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some space or write to another disk",
            errno.EDQUOT: "free some space or write to another disk",
            errno.EFBIG: "the limit on file sizes (`ulimit -f`, or the file system's own) is below what is needed",
            errno.EACCES: "check the folder's permissions, or write elsewhere with `-o`",
            errno.EROFS: "the file system is read-only: write elsewhere with `-o`",
            errno.EEXIST: "one of the folders in that path is a file: write elsewhere with `-o`",
            errno.ENOTDIR: "one of the folders in that path is a file: write elsewhere with `-o`",
            errno.ENOENT: "",
        }
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{path}: cannot write: {reason}", hints.get(error.errno or 0, "")) from error


def new_name(path: Path) -> Path:
    """A hidden name beside `path`, for what is not whole yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def check_target(path: Path, *, folder: bool = False) -> None:
    """Raises UsageError if no file (or `folder`) can have that name: found before the work, not after it."""
    if not path.absolute().name or path.name in ("", ".."):
        raise UsageError(f"output `{path}`: expected the name of a {'folder' if folder else 'file'}")
    if folder and os.path.isfile(path):  # noqa: PTH113  a name that is too long is told when it is written
        raise UsageError(f"{path}: is a file, a folder was expected")
    if not folder and os.path.isdir(path):  # noqa: PTH112
        raise UsageError(f"{path}: is a folder, a file name was expected")


def expect_finite(tensors: Mapping[str, Tensor], path: Path, hint: str) -> None:
    """Raises InputError if a number of those that are to be written to `path` is none in its dtype."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            narrow = ", or write float32 or bfloat16" if dtype == "float16" else ""
            raise InputError(f"{path}: `{name}` would have NaN or infinity as {dtype}", hint + narrow)


@contextlib.contextmanager
def whole_file(path: Path) -> Generator[IO[bytes]]:
    """A binary file that takes the name `path` when the block ends without an exception, else vanishes.

    Missing parent folders are made. An existing file is replaced in one step.
    """
    check_target(path)
    temporary = new_name(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8; the file appears whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def whole_folder(path: Path) -> Generator[Path]:
    """An empty folder that takes the name `path` when the block ends without an exception, else vanishes.

    If `path` is a folder already, its other files stay, and the new ones replace those of their names.
    """
    check_target(path, folder=True)
    temporary = new_name(path.absolute())
    with write_errors(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            if path.is_dir():
                new = {file.name for file in temporary.iterdir()}
                for file in sorted(temporary.iterdir(), key=lambda each: each.suffix == ".safetensors"):
                    file.replace(path / file.name)
                _remove_stale(path, new)
            else:
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_targets(targets: Iterable[tuple[Path, Sequence[str]]], inputs: Mapping[str, Path]) -> None:
    """Raises UsageError unless each target can be a file, has one of its suffixes (if any are given), is no input and
    is written once."""
    seen: set[str] = set()
    for target, suffixes in targets:
        check_target(target)
        if suffixes and target.suffix not in suffixes:
            raise UsageError(f"{target}: expected a {' or '.join(suffixes)} file")
        place = os.path.normpath(target.absolute())
        if place in seen:
            raise UsageError(f"{target}: two outputs have this name")
        seen.add(place)
        refuse_inputs(target, inputs)


def _remove_stale(folder: Path, new: set[str]) -> None:
    """Removes the weights of a model that the files `new` have replaced: loaders would prefer or mix them."""
    if not any(name.endswith(".safetensors") for name in new):
        return
    for file in [*folder.glob("model-*-of-*.safetensors"), *folder.glob("model.safetensors*")]:
        if file.name not in new:
            file.unlink()


def refuse_inputs(target: Path, inputs: Mapping[str, Path]) -> None:
    """Raises UsageError if `target` is, or holds, one of the files that will be read: an input is never replaced."""
    if not os.path.exists(target):  # noqa: PTH110
        return
    for name, path in inputs.items():
        if path.exists() and (target.samefile(path) or (target.is_dir() and target.samefile(path.parent))):
            raise UsageError(f"{target}: the output would replace an input ({name})", "choose another name")


class SafetensorsWriter:
    """A safetensors file written tensor by tensor, in any order and in blocks, byte for byte as
    `safetensors.torch.save_file` writes the same content; it takes its name when closed whole.

    `layout` gives dtype and shape of every tensor before the first is written: the header comes first.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self._whole = whole_file(path)
        rank = {dtype: place for place, dtype in enumerate(DTYPE_BYTES)}
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
        place = len(self._header) + self._starts[name] + start * data.element_size()
        done = 0
        while done < len(buffer):
            done += os.pwrite(self._file.fileno(), buffer[done:], place + done)
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
