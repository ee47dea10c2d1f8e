"""Checkpoints on this machine that are stored in an old format: converted into the store."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from mergecli.adapter_files import is_adapter
from mergecli.checkpoint import open_checkpoint
from mergecli.conversion import convert, is_pickled, needs_conversion
from mergecli.conversion.pickles import pickled_files
from mergecli.errors import UsageError
from mergecli.hub.store import writing
from mergecli.output import whole_folder

_COPIED = (".json", ".txt")
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".safetensors")


def place(path: Path, home: Path, *, allow_pickle: bool) -> Path:
    """Where the checkpoint can be read: itself, or else its conversion in the store, one for the same content, which
    `make` puts there.

    Raises:
        UsageError: it is a pickle that is not converted yet, and `allow_pickle` is not set. InputError: it is damaged.
    """
    if is_adapter(path) or not needs_conversion(path):
        return path
    state = hashlib.sha256()
    for file in _content(path):
        with file.open("rb") as stream:
            state.update(hashlib.file_digest(stream, "sha256").digest())
    folder = home / "converted" / state.hexdigest()[:32]
    if not (allow_pickle or os.path.isdir(folder)) and is_pickled(path):  # noqa: PTH112  a name that is too long is none
        raise UsageError(
            f"{path}: is a pickle, which may start any program when it is opened; so it is not opened by default",
            "`--allow-pickle` converts it with torch's restricted reader, which makes tensors and refuses all else",
        )
    return folder if path.is_dir() else folder / "model.safetensors"


def make(path: Path, target: Path) -> None:
    """Converts the checkpoint to the `place` it has, unless it is there. A folder's configuration and tokenizer files
    come with it.

    Raises:
        InputError: it is damaged, would run code, or cannot be written.
    """
    if target == path or os.path.exists(target):  # noqa: PTH110
        return
    with writing(target), whole_folder(target if path.is_dir() else target.parent) as folder:
        convert(path, folder / "model.safetensors", allow_pickle=True)
        for file in _files(path):
            if path.is_dir() and file.suffix in _COPIED and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)


def _content(path: Path) -> list[Path]:
    """The files that the conversion depends on."""
    if path.is_dir():
        return [file for file in _files(path) if file.suffix in (*_WEIGHTS, *_COPIED)]
    if not path.name.endswith(".index.json"):
        return [path]
    if shards := pickled_files(path):
        return [path, *shards]
    with open_checkpoint(path) as stored:
        return [path, *stored.files]


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
