"""What `hf:`, `ms:`, `toy:` and a path mean, and where a fetched one lies."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from mergecli.runtime.errors import InputError, UsageError, did_you_mean, quoted

Kind = Literal["hf", "ms", "toy", "path"]

HUBS = {"hf": "Hugging Face", "ms": "ModelScope"}
DEFAULT_BRANCH = {"hf": "main", "ms": "master"}


TOY_MODELS = Path(__file__).parents[1] / "data" / "toy" / "models"


_REPOSITORY = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A place that weights or images come from, as written in a recipe or on the command line."""

    kind: Kind
    name: str
    """`org/name` of a hub, a toy's name, or the path as it was written."""
    revision: str | None = None
    path: Path | None = None
    """For `kind == "path"`: the path itself, joined to the folder it is relative to."""
    inside: str | None = None
    """A file or folder inside of it, with `/` between names; else the whole."""
    modelscope: str | None = None
    """`org/name` on ModelScope, where it is another than on Hugging Face."""
    task: str | None = None
    """Of a file that holds towers of several tasks, the task whose tower is meant; written `PATH#TASK`."""
    dtype: str | None = None
    """What the weights are rounded to as they are read, where that is not their own dtype."""
    adapter: Source | None = None
    """A low-rank adapter that is added to the weights as they are read."""
    is_data: bool = False
    """Whether it is a data set; hubs keep those apart from models."""
    pinned: Source | None = None
    """What a lock file says it is: the same, or its like on another hub, with a commit as revision."""

    def __str__(self) -> str:
        """As it is written; `parse_source` reads it back, but for `modelscope`, `dtype` and `adapter`."""
        inside = f"#{self.inside or self.task}" if self.inside or self.task else ""
        if self.kind == "path":
            return self.name + inside
        return f"{self.kind}:{self.name}" + (f"@{self.revision}" if self.revision else "") + inside

    @property
    def label(self) -> str:
        """The source as results record it: without the folders of a path, which differ from machine to machine."""
        label = Path(self.name).name if self.kind == "path" else str(self)
        if self.kind == "path" and (part := self.inside or self.task):
            label += f"#{part}"
        if self.dtype:
            label += f" as {self.dtype}"
        if self.adapter:
            label += f" + {self.adapter.label}"
        return label.encode("utf-8", "backslashreplace").decode()

    @property
    def written(self) -> str | dict[str, str]:
        """The source as recipes record it: its label, or a table where that says too little."""
        plain = replace(self, dtype=None, adapter=None)
        table = {"source": plain.label}
        if self.dtype:
            table["dtype"] = self.dtype
        if self.adapter:
            table["adapter"] = self.adapter.label
        return table if len(table) > 1 else plain.label


def parse_source(text: str, anchor: Path) -> Source:
    """The source that `text` stands for; a relative path is relative to the folder `anchor`.

    Raises:
        UsageError: the text is empty, or has a prefix or a repository name of no known form.
    """
    prefix, colon, rest = text.partition(":")
    if not text.strip():
        raise UsageError("a source is empty", "write `hf:org/name`, `ms:org/name`, `toy:name` or a path")
    if colon and prefix in (*HUBS, "toy"):
        whole, hash_, inside = rest.removeprefix("//").partition("#")
        name, at, revision = whole.partition("@")
        if (
            (at and not revision)
            or not _REPOSITORY.fullmatch(name)
            or (prefix == "toy" and (revision or hash_ or "/" in name))
        ):
            form = "toy:name" if prefix == "toy" else f"{prefix}:org/name@revision"
            raise UsageError(f"source `{text}`: expected `{form}`")
        return Source(
            cast("Kind", prefix), name, revision or None, inside=checked_inside(inside) if hash_ else None
        )
    if colon and prefix.isalpha() and len(prefix) > 1 and not (anchor / text).exists():
        raise UsageError(
            f"source `{text}`: unknown prefix `{prefix}:`{did_you_mean(prefix, (*HUBS, 'toy'))}",
            "the prefixes are `hf:`, `ms:` and `toy:`; anything else is a path",
        )
    path = anchor / os.path.expanduser(text)  # noqa: PTH111  leaves an unknown `~user` alone
    name, hash_, task = text.rpartition("#")
    if hash_ and task and not os.path.exists(path):  # noqa: PTH110  a name that is too long does not exist either
        file = path.with_name(path.name.rpartition("#")[0] or "#")
        if file.suffix == ".safetensors":
            return Source("path", name, None, file, task=task)
    return Source("path", text, None, path)


def checked_inside(path: str) -> str:
    """A path inside a repository, once it is sure that it stays inside.

    Raises:
        UsageError: it does not.
    """
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts) or "\\" in path:
        raise UsageError(
            f"`{path}`: expected a file or folder inside the repository, such as `vision/model.safetensors`"
        )
    return path


def home() -> Path:
    """The folder of the store: `MERGECLI_HOME`, else `mergecli` in the user's cache folder."""
    if own := os.environ.get("MERGECLI_HOME"):
        return Path(os.path.expanduser(own))  # noqa: PTH111
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache or os.path.expanduser("~/.cache")) / "mergecli"  # noqa: PTH111


def store_folder(source: Source) -> Path:
    """The folder of the store for all commits of a hub's repository: a folder for each commit, and `refs/<revision>`
    files that hold the commit which a branch or tag stood for when it was fetched."""
    return home() / source.kind / ("datasets" if source.is_data else "") / source.name


def locate(source: Source) -> Path:
    """The file or folder on disk that holds the source.

    Raises:
        InputError: it is not there; the hint says how to get it.
    """
    root = _located(source)
    path = root / source.inside if source.inside else root
    if path.suffix in (".bin", ".pt", ".pth") and path.with_suffix(".safetensors").is_file():
        return path.with_suffix(".safetensors")  # `fetch` converted it
    if source.inside and not path.exists():
        raise InputError(f"{source}: there is no `{source.inside}` in {root}")
    return path


def _located(source: Source) -> Path:
    if source.kind == "path":
        path = source.path or Path(source.name)
        if not os.path.exists(path):  # noqa: PTH110  a name that is too long does not exist either
            hub = not path.is_absolute() and source.name.count("/") == 1 and not source.name.startswith(".")
            hint = f"for the hub's model write `hf:{source.name}`" if hub and "." not in path.name else ""
            raise InputError(f"{source.name}: no such file or folder", hint)
        return path
    if source.kind == "toy":
        path = TOY_MODELS / source.name
        if not path.is_dir():
            known = sorted(folder.name for folder in TOY_MODELS.iterdir() if folder.is_dir())
            raise InputError(
                f"{source}: there is no such toy{did_you_mean(source.name, known)}",
                "the toys are " + ", ".join(f"`toy:{name}`" for name in known),
            )
        return path
    pinned = source.pinned or source
    folder = store_folder(pinned)
    commit = pinned.revision or DEFAULT_BRANCH[pinned.kind]
    path = folder / (_referred(folder / "refs" / commit) or commit)
    if not path.is_dir():
        name = str(source).replace(":", ":datasets/", 1) if source.is_data else str(source)
        which = f"commit {commit[:12]}, which its lock names, " if source.pinned else ""
        raise InputError(
            f"{source}: {which}has not been fetched",
            f"run `mergecli fetch {name}`, or with the recipe, where there is a network",
        )
    _check_whole(path, source)
    return path


def _referred(reference: Path) -> str:
    """The commit that a file of `refs/` names; empty if there is none."""
    try:
        commit = reference.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return commit if re.fullmatch(r"[0-9a-f]{7,64}", commit) else ""


def _check_whole(folder: Path, source: Source) -> None:
    """Raises InputError unless the files that `fetch` put there are there, each with its size."""
    manifest = folder / ".mergecli.json"
    try:
        files: Any = json.loads(manifest.read_bytes())["files"]
        sizes = {str(name): int(each["size"]) for name, each in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # put there by hand, or by another version
    wrong = [
        name
        for name, size in sizes.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != size
    ]
    if wrong:
        raise InputError(
            f"{source}: {quoted(wrong)} in {folder} {'is' if len(wrong) == 1 else 'are'} missing or not as fetched",
            "delete that folder and fetch again",
        )


def named_sources(arguments: Sequence[str]) -> dict[str, str]:
    """Name -> source of `[NAME=]SOURCE` arguments, in order; a file's, folder's or toy's own name serves by default.

    Raises:
        UsageError: two have one name.
    """
    sources: dict[str, str] = {}
    for argument in arguments:
        name, equals, source = argument.partition("=")
        if not equals or "/" in name:
            source = argument
            whole, _, task = argument.rpartition(".safetensors#")
            path = Path((whole or argument).split(":")[-1].split("@")[0])
            name = path.stem if path.suffix in (".safetensors", ".json") else path.name
            name = f"{path.name}-{task}" if whole else name
            if name in ("model", "model.safetensors.index"):
                name = path.absolute().parent.name
        if not name or not source:
            raise UsageError(f"`{argument}`: expected `NAME=SOURCE`")
        if name in sources:
            raise UsageError(
                f"two models are called `{name}`: {sources[name]} and {source}", "write `NAME=PATH`"
            )
        sources[name] = source
    return sources
