"""Which files of a repository are used: the only ones that are downloaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from mergecli.data.splits import split_of
from mergecli.formats.quantized import shared_path
from mergecli.runtime.errors import HubError, UsageError, quoted
from mergecli.storage.safetensors_format import shards_of
from mergecli.storage.store import RemoteFile

LISTED_SUFFIXES = (
    ".json",
    ".txt",
    ".model",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".parquet",
    ".py",
)
"""Only files with these suffixes can be chosen, or explain why nothing can."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_BESIDE = (
    "config*.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model",
    "open_clip_config.json", "adapter_config.json",
)  # fmt: skip
_ADAPTERS = ("adapter_model.safetensors", "linearized_adapter_model.safetensors")


class OnlyPickledError(HubError):
    """The weights are there only as pickles, and `allow_pickle` is not set."""


class NoParquetError(HubError):
    """A data set has no Parquet files at this revision."""


def model_files(
    files: Sequence[RemoteFile],
    inside: str | None,
    allow_pickle: bool,
    where: str,
    read: Callable[[RemoteFile], bytes],
) -> tuple[RemoteFile, ...]:
    """The weights of one model or adapter, as `open_checkpoint` would choose them, and the configuration, tokenizer and
    processor beside them. `inside` names a file or a folder of the repository, else it is the repository's top.

    Safetensors are taken where there are any; pickles only if they may be, and there is nothing else or `inside`
    names one. Shards are those that their index names, for which it is `read`.

    Raises:
        OnlyPickledError: the weights are pickles, and `allow_pickle` is not set.
        HubError: there are no weights, or no such file or folder; a file is empty, or a shard is missing.
        UsageError: `inside` is a file that has no weights.
    """
    named = next((file for file in files if file.path == inside), None)
    folder = (PurePosixPath(inside).parent if named and inside else PurePosixPath(inside or ".")).as_posix()
    here = {
        PurePosixPath(file.path).name: file
        for file in files
        if PurePosixPath(file.path).parent.as_posix() == folder
    }
    if inside and not here:
        folders = {PurePosixPath(file.path).parent.as_posix() for file in files} - {"."}
        raise HubError(
            f"{where}: there is no `{inside}`",
            f"its folders are {quoted(sorted(folders))}" if folders else "",
        )
    if named and not named.path.removesuffix(".index.json").endswith((".safetensors", *PICKLED)):
        raise UsageError(
            f"{where}: `{named.path}` is no file of weights",
            "name one, or a folder, or leave out what follows `#`",
        )
    beside = [file for name, file in here.items() if any(fnmatchcase(name, pattern) for pattern in _BESIDE)]
    beside = [file for file in beside if not file.path.endswith(".index.json")]
    weights = _weights(list(here), PurePosixPath(named.path).name if named else None, where)
    if not allow_pickle:
        _refuse_pickles(weights, where)
    for index in [name for name in weights if name.endswith(".index.json")]:
        weights += _shards(read(here[index]), index, here, where)
    if not allow_pickle:
        _refuse_pickles(weights, where)
    if empty := [name for name in weights if not here[name].size]:
        raise HubError(f"{where}: `{empty[0]}` is empty", "name a revision that has the weights")
    # residual task vectors are added to one more file
    mean = [file for file in files if file.path == shared_path(PurePosixPath(folder)).as_posix()]
    return tuple(sorted({*beside, *mean, *(here[name] for name in weights)}, key=lambda file: file.path))


def _refuse_pickles(weights: Sequence[str], where: str) -> None:
    if any(name.removesuffix(".index.json").endswith(PICKLED) for name in weights):
        raise OnlyPickledError(
            f"{where}: has its weights only as {quoted(weights, 3)}: pickles, which may start any program when opened",
            "`--allow-pickle` fetches and converts them with torch's restricted reader; or name a revision that has "
            "safetensors, such as `@refs/pr/1`",
        )


def _shards(content: bytes, index: str, known: Collection[str], where: str) -> list[str]:
    """The files that an index of shards names, all of them beside it."""
    try:
        names = shards_of(content)
        if not all(name.endswith((".safetensors", *PICKLED)) for name in names):
            raise ValueError("`weight_map` does not name files of weights")
    except ValueError as error:
        raise HubError(f"{where}: `{index}` is not an index of shards: {error}") from error
    if missing := [name for name in names if name not in known]:
        raise HubError(f"{where}: `{index}` names {quoted(missing)}, which the hub does not have beside it")
    return names


def _weights(names: list[str], named: str | None, where: str) -> list[str]:
    """The names of the weights among the files of one folder; of shards, that of their index."""
    if named:
        return [named]
    tensors = [name for name in names if name.endswith(".safetensors")]
    adapters = [name for name in names if name in _ADAPTERS]
    if "model.safetensors" in names:
        return ["model.safetensors", *adapters]
    if "model.safetensors.index.json" in names:
        return ["model.safetensors.index.json", *adapters]
    if tensors:
        return tensors
    if "pytorch_model.bin" in names:
        return ["pytorch_model.bin"]
    if "pytorch_model.bin.index.json" in names:
        return ["pytorch_model.bin.index.json"]
    pickled = [
        name
        for name in names
        if name.endswith(PICKLED) and not name.startswith(("training_args", "optimizer"))
    ]
    if len(pickled) == 1:
        return pickled
    raise HubError(
        f"{where}: has no safetensors file" + (f", but {quoted(pickled)}" if pickled else ""),
        "name the file after `#`, as in `hf:org/name#weights.safetensors`" if pickled else "",
    )


def data_files(
    files: Sequence[RemoteFile], config: str | None, needed: Sequence[str], wanted: Sequence[str], where: str
) -> tuple[RemoteFile, ...]:
    """The Parquet files of the splits `needed`, and of those of `wanted` that there are.

    The split is in the file's name, as for `parquet_splits`; where there is a folder called `config`, only the files
    in it count.

    Raises:
        NoParquetError: there is no Parquet file at all.
        HubError: a needed split is missing, or in several folders, which are different configurations.
    """
    every = [file for file in files if file.path.endswith(".parquet")]
    if not every:
        scripts = [file.path for file in files if file.path.endswith(".py")]
        reason = (
            f": its images come out of a script (`{scripts[0]}`), which would have to be run"
            if scripts
            else ""
        )
        raise NoParquetError(
            f"{where}: has no Parquet files{reason}",
            "name a data set that has them, or give a folder of images or Parquet files as the task's `data`",
        )
    chosen = [file for file in every if config in PurePosixPath(file.path).parts] or every
    found: dict[str, list[RemoteFile]] = {}
    homes: dict[str, set[str]] = {}
    for file in chosen:
        split, folder = split_of(PurePosixPath(file.path))
        found.setdefault(split, []).append(file)
        homes.setdefault(split, set()).add(folder.as_posix())
    for split in needed:
        if split not in found:
            raise HubError(f"{where}: has no split `{split}`", f"it has {quoted(sorted(found))}")
    used = [split for split in found if split in needed or split in wanted]
    for split in used:
        if len(homes[split]) > 1:
            raise HubError(
                f"{where}: has split `{split}` in several folders: {quoted(sorted(homes[split]))}",
                "they are different configurations: name one after `#`, as in `hf:org/name#folder`",
            )
    return tuple(sorted((file for split in used for file in found[split]), key=lambda file: file.path))
