"""Checkpoints on this machine that are stored in an old format: converted into the store."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from mergecli.conversion import convert, needs_conversion
from mergecli.output import whole_folder

_COPIED = (".json", ".txt")
_WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")


def readable(path: Path, home: Path, *, allow_pickle: bool) -> Path:
    """The checkpoint itself if it can be read as it is; else its conversion, made once for the same content.

    A folder's configuration and tokenizer files come with it.

    Raises:
        UsageError: it is a pickle, and `allow_pickle` is not set. InputError: it is damaged, or would run code.
    """
    if not needs_conversion(path):
        return path
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    state = hashlib.sha256()
    for file in files:
        if file.suffix in (*_WEIGHTS, *_COPIED):
            with file.open("rb") as stream:
                state.update(hashlib.file_digest(stream, "sha256").digest())
    target = home / "converted" / state.hexdigest()[:32]
    if not target.is_dir():
        with whole_folder(target) as folder:
            convert(path, folder / "model.safetensors", allow_pickle=allow_pickle)
            for file in files:
                if path.is_dir() and file.suffix in _COPIED and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, folder / file.name)
    return target if path.is_dir() else target / "model.safetensors"
