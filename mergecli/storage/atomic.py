"""Files and folders that appear whole or not at all, and paths checked before the work."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import warnings
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mergecli.runtime.dry_run import is_dry
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError, either, quoted
from mergecli.storage.unfinished import locked, new_name, remove_leftovers

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def write_errors(path: Path) -> Generator[None]:
    """Turns the operating system's refusals in the block into one clear InputError about `path`."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some space or write to another disk",
            errno.EDQUOT: "free some space or write to another disk",
            errno.EFBIG: "the limit on file sizes (`ulimit -f`, or the file system's own) is below what is needed",
            errno.EACCES: "check the folder's permissions, or write elsewhere with `-o`",
            errno.EPERM: "write elsewhere with `-o`",
            errno.EROFS: "the file system is read-only: write elsewhere with `-o`",
            errno.EEXIST: "one of the folders in that path is a file: write elsewhere with `-o`",
            errno.ENOTDIR: "one of the folders in that path is a file: write elsewhere with `-o`",
            errno.ENOENT: "",
        }
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{path}: cannot write: {reason}", hints.get(error.errno or 0, "")) from error


def check_target(path: Path, *, folder: bool = False) -> None:
    """Tries whether a file (or `folder`) can have that name: found before the work, not after it. What killed programs have
    left beside it is removed.

    Raises:
        UsageError: nothing can be called so, or there is something else of that name.
        InputError: it cannot be written.
    """
    check_name(path, folder=folder)
    if not is_dry():
        for place in (path.parent, path) if folder else (path.parent,):
            remove_leftovers(place)
    with write_errors(path):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # refuses a name that is too long
        nearest = path.absolute() if folder and path.is_dir() else path.absolute().parent
        while not os.path.lexists(nearest):
            nearest = nearest.parent
        _refuse_of_others(path)
        _try_to_write(nearest, path.name)


def _try_to_write(folder: Path, name: str) -> None:
    """Raises OSError if no file can be made in the folder; where the system can make one without a name, none is seen."""
    if hasattr(os, "O_TMPFILE"):
        try:
            os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600))
            return
        except OSError as error:
            # some file systems have no such files, and say so in these ways
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
    trial = new_name(folder / name)  # in what is no folder it fails as the file itself would
    try:
        trial.open("xb").close()
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()


def _refuse_of_others(path: Path) -> None:
    """Raises PermissionError if the file is another user's, in a folder such as `/tmp` where only they may replace it."""
    if not hasattr(os, "geteuid") or not path.exists():
        return
    user, folder = os.geteuid(), path.absolute().parent.stat()
    if folder.st_mode & stat.S_ISVTX and user not in (0, path.lstat().st_uid, folder.st_uid):
        raise PermissionError(errno.EPERM, "the file is another user's")


def check_name(path: Path, *, folder: bool = False) -> None:
    """Raises UsageError if a file (or `folder`) cannot be called so."""
    if path.parts[:1] == ("-",):
        raise UsageError(
            "output `-`: expected the name of a file or folder",
            "stdout gets tables only, and only without the option",
        )
    if not path.absolute().name or path.name in ("", ".."):
        raise UsageError(f"output `{path}`: expected the name of a {'folder' if folder else 'file'}")
    if (meant := os.path.expanduser(path)) != str(path):  # noqa: PTH111  leaves an unknown `~user` alone
        raise UsageError(f"output `{path}`: `~` would be the name of a folder here", f"write `{meant}`")
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # a name that is too long is refused when it is written
        if "\0" in str(path):
            raise UsageError(f"output `{path}`: no name has a null character in it") from None
        return
    if folder and not stat.S_ISDIR(mode):
        raise UsageError(f"{path}: is a file, a folder was expected")
    if not folder and stat.S_ISDIR(mode):
        raise UsageError(f"{path}: is a folder, a file name was expected")
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)) or _is_open_file(path):
        raise UsageError(
            f"{path}: is a pipe or a device, a file name was expected", "a file of that name would replace it"
        )


def _is_open_file(path: Path) -> bool:
    """Whether the path is a name of a file that a process has open, such as `/dev/stdout`."""
    with contextlib.suppress(OSError):
        return path.readlink().is_relative_to("/proc")
    return False


def check_space(sizes: Mapping[Path, int]) -> None:
    """Raises InputError if the disks have no room for files of so many bytes; called as soon as that is known."""
    needed: dict[int, int] = {}
    for path, size in sizes.items():
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        with write_errors(path):
            disk, free = folder.stat().st_dev, shutil.disk_usage(folder).free
        needed[disk] = needed.get(disk, 0) + size
        if needed[disk] > free:
            raise InputError(
                f"{path}: {needed[disk]:,} bytes are to be written, and the disk has room for {free:,}",
                "free some space, or write to another disk",
            )


def warn_of_others(folder: Path, own: Collection[str], inputs: Iterable[Path] = ()) -> None:
    """Warns of what is in the folder besides the files to be written there and the inputs, all of which stays."""
    if not folder.is_dir():
        return
    read = {os.path.normpath(path.absolute()) for path in inputs}
    others = [
        path.name
        for path in sorted(folder.iterdir())
        if path.name not in own
        and not path.name.startswith(".")
        and os.path.normpath(path.absolute()) not in read
    ]
    if others:
        text = f"{folder}: has other files, which stay: {quoted(others, 3)}"
        warnings.warn(text, MergecliWarning, stacklevel=2)


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
    check_name(path)
    temporary = new_name(path)
    _refuse_in_dry_run(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("x+b") as file, locked(temporary):
                yield file
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _refuse_in_dry_run(path: Path) -> None:
    """Raises InputError in a dry run. What comes so far is a cache, which does without the file as where the disk is full."""
    if is_dry():
        raise InputError(f"{path}: is not written in a dry run")


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8; the file appears whole or not at all."""
    with whole_file(path) as file:
        # file names that are no Unicode are in texts as halves of characters
        file.write(text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def whole_folder(path: Path, replaced: Collection[str] = ()) -> Generator[Path]:
    """An empty folder that takes the name `path` when the block ends without an exception, else vanishes.

    If `path` is a folder already, its other files stay, which is told, and the new ones replace those of their names: shards
    first, which have names of their own, and what readers look for last, so that they see the old model or the new one. The
    caller removes those `replaced`.
    """
    check_name(path, folder=True)
    _refuse_in_dry_run(path)
    whole = path.absolute()
    # inside a folder that is there, which may be a disk of its own
    temporary = new_name(whole / whole.name if whole.is_dir() else whole)
    with write_errors(path):
        try:
            temporary.mkdir(parents=True)
            with locked(temporary):
                yield temporary
            if not _renamed(temporary, path):
                new = {file.name for file in temporary.iterdir()}
                for file in sorted(temporary.iterdir(), key=_turn):
                    file.replace(path / file.name)
                _remove_stale(path, new)
                warn_of_others(path, {*new, *replaced})
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _renamed(temporary: Path, path: Path) -> bool:
    """Gives the folder its name; not if there is one already, which another program may have made meanwhile."""
    if path.is_dir():
        return False
    try:
        temporary.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        return False
    return True


def check_targets(targets: Iterable[tuple[Path, Sequence[str]]], inputs: Mapping[str, Path]) -> None:
    """Raises UsageError unless each target can be a file, has one of its suffixes (if any are given), is no input and
    is written once."""
    seen: set[str] = set()
    for target, suffixes in targets:
        check_target(target)
        if suffixes and target.suffix not in suffixes:
            raise UsageError(f"{target}: expected a {either(suffixes)} file")
        normal = os.path.normpath(target.absolute())
        if normal in seen:
            raise UsageError(f"{target}: two outputs have this name")
        for other in seen:
            if normal.startswith(other + os.sep) or other.startswith(normal + os.sep):
                raise UsageError(f"{target}: another output would be a file and a folder at once: {other}")
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
