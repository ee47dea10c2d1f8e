"""A data folder: which files belong to which split, what they hold, and the digest of it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path, PurePath

from mergecli.errors import InputError, quoted
from mergecli.parquet_names import split_of

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def parquet_splits(root: Path, config: str | None, where: str) -> dict[str, list[Path]]:
    """Split -> its Parquet files, from names as `test-00000-of-00002.parquet`, `test.parquet` or `test/0.parquet`.

    They may lie at any depth; where there is a folder called `config`, only those in it count.

    Raises:
        InputError: files of one split lie in several folders, which are different configurations.
    """
    every = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    paths = {file: file.relative_to(root if root.is_dir() else root.parent) for file in every}
    paths = {
        file: path for file, path in paths.items() if not any(part.startswith(".") for part in path.parts)
    }
    chosen = {file: path for file, path in paths.items() if config in path.parts}
    found: dict[str, list[Path]] = {}
    homes: dict[str, set[PurePath]] = {}
    for file, path in (chosen or paths).items():
        split, folder = split_of(path)
        found.setdefault(split, []).append(file)
        homes.setdefault(split, set()).add(folder)
    for split, folders in homes.items():
        if len(folders) > 1:
            names = [folder.as_posix() for folder in sorted(folders)]
            raise InputError(
                f"{where}: has split `{split}` in several folders: {quoted(names)}",
                "give one of them as the task's `data`",
            )
    return found


def folder_splits(root: Path) -> dict[str, list[Path]]:
    """Split -> its images, which lie in `<split>/<class>/`, or in `<class>/` for data of one split, called `test`."""
    if not root.is_dir():
        return {}
    top = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    splits = {folder.name: found for folder in top if (found := _pictures(folder))}
    return splits or ({"test": found} if (found := _pictures(root)) else {})


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*/*") if file.suffix.lower() in _SUFFIXES)


def fingerprint(files: Sequence[Path], with_names: bool) -> str:
    """The digest of the files' contents, in order; an image folder's class names count too."""
    import xxhash

    lines: list[str] = []
    for file in files:
        state = xxhash.xxh3_128()
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                state.update(block)
        lines.append(f"{file.parent.name if with_names else ''} {state.hexdigest()}\n")
    return digest(*lines)


def digest(*parts: str) -> str:
    return "xxh3:" + sha256("".join(parts).encode()).hexdigest()[:32]
