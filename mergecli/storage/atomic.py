"""Files and folders that appear whole or not at all, and paths checked before the work."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mergecli.runtime.errors import InputError, UsageError

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
    if folder and os.path.isfile(path):  # noqa: PTH113  a name that is too long is refused when it is written
        raise UsageError(f"{path}: is a file, a folder was expected")
    if not folder and os.path.isdir(path):  # noqa: PTH112
        raise UsageError(f"{path}: is a folder, a file name was expected")


def expect_finite(tensors: Mapping[str, Tensor], path: Path, hint: str) -> None:
    """Raises InputError if a tensor that is to be written to `path` has NaN or infinity."""
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
            with temporary.open("x+b") as file:
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

    If `path` is a folder already, its other files stay, and the new ones replace those of their names: shards first, which
    have names of their own, and what readers look for last, so that they see the old model or the new one.
    """
    check_target(path, folder=True)
    temporary = new_name(path.absolute())
    with write_errors(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            if path.is_dir():
                new = {file.name for file in temporary.iterdir()}
                for file in sorted(temporary.iterdir(), key=_turn):
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
        normal = os.path.normpath(target.absolute())
        if normal in seen:
            raise UsageError(f"{target}: two outputs have this name")
        seen.add(normal)
        refuse_inputs(target, inputs)


def _turn(file: Path) -> tuple[int, str]:
    """When a file takes its place among those of a folder."""
    if file.name.startswith("model-"):
        return 0, file.name
    return 1 + (file.suffix == ".safetensors" or file.name.endswith(".index.json")), file.name


def _remove_stale(folder: Path, new: set[str]) -> None:
    """Removes the weights of a model that the files `new` have replaced: loaders would prefer or mix them."""
    if not any(name.endswith(".safetensors") for name in new):
        return
    for file in [*folder.glob("model.safetensors*"), *folder.glob("model-*-of-*.safetensors")]:
        if file.name not in new:
            file.unlink()


def refuse_inputs(target: Path, inputs: Mapping[str, Path]) -> None:
    """Raises UsageError if `target` is, or holds, one of the files that will be read: an input is never replaced."""
    if not os.path.exists(target):  # noqa: PTH110
        return
    for name, path in inputs.items():
        if path.exists() and (target.samefile(path) or (target.is_dir() and target.samefile(path.parent))):
            raise UsageError(f"{target}: the output would replace an input ({name})", "choose another name")


@contextmanager
def writing(path: Path, hint: str = "name another store with `--into` or MERGECLI_HOME") -> Generator[None]:
    """As `write_errors`, with `hint` in place of hints that name the option `-o`."""
    try:
        with write_errors(path):
            yield
    except InputError as error:
        raise InputError(error.message, hint if "`-o`" in error.hint else error.hint) from error
