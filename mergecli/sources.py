"""What `hf:`, `ms:`, `toy:` and a path mean, and where a fetched one lies."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from mergecli.errors import InputError, UsageError, did_you_mean

Kind = Literal["hf", "ms", "toy", "path"]

HUBS = {"hf": "Hugging Face", "ms": "ModelScope"}
TOY_MODELS = Path(__file__).parent / "toy" / "models"

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A place that weights or images come from, as written in a recipe or on the command line."""

    kind: Kind
    name: str
    """`org/name` of a hub, a toy's name, or the path as it was written."""
    revision: str | None = None
    path: Path | None = None
    """For `kind == "path"`: the path itself, joined to the folder it is relative to."""

    def __str__(self) -> str:
        if self.kind == "path":
            return self.name
        return f"{self.kind}:{self.name}" + (f"@{self.revision}" if self.revision else "")

    @property
    def label(self) -> str:
        """The source as results record it: without the folders of a path, which differ from machine to machine."""
        label = Path(self.name).name if self.kind == "path" else str(self)
        return label.encode("utf-8", "backslashreplace").decode()


def parse_source(text: str, anchor: Path) -> Source:
    """The source that `text` stands for; a relative path is relative to the folder `anchor`.

    Raises:
        UsageError: the text is empty, or has a prefix or a repository name of no known form.
    """
    prefix, colon, rest = text.partition(":")
    if not text.strip():
        raise UsageError("a source is empty", "write `hf:org/name`, `ms:org/name`, `toy:name` or a path")
    if colon and prefix in (*HUBS, "toy"):
        name, _, revision = rest.removeprefix("//").partition("@")
        if not _REPOSITORY.fullmatch(name) or (prefix == "toy" and (revision or "/" in name)):
            form = "toy:name" if prefix == "toy" else f"{prefix}:org/name@revision"
            raise UsageError(f"source `{text}`: expected `{form}`")
        return Source(cast("Kind", prefix), name, revision or None)
    if colon and prefix.isalpha() and len(prefix) > 1 and not (anchor / text).exists():
        raise UsageError(
            f"source `{text}`: unknown prefix `{prefix}:`{did_you_mean(prefix, (*HUBS, 'toy'))}",
            "the prefixes are `hf:`, `ms:` and `toy:`; anything else is a path",
        )
    return Source("path", text, None, anchor / os.path.expanduser(text))  # noqa: PTH111  leaves an unknown `~user` alone


def home() -> Path:
    """The folder of the store: `MERGECLI_HOME`, else `mergecli` in the user's cache folder."""
    if own := os.environ.get("MERGECLI_HOME"):
        return Path(os.path.expanduser(own))  # noqa: PTH111
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache or os.path.expanduser("~/.cache")) / "mergecli"  # noqa: PTH111


def locate(source: Source) -> Path:
    """The file or folder on disk that holds the source.

    Raises:
        InputError: it is not there; the hint says how to get it.
    """
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
    folder = home() / source.kind / source.name
    commit = source.revision or ("main" if source.kind == "hf" else "master")
    reference = folder / "refs" / commit
    path = folder / (reference.read_text("utf-8").strip() if reference.is_file() else commit)
    if not path.is_dir():
        raise InputError(
            f"{source}: has not been fetched", f"run `mergecli fetch {source}` where there is a network"
        )
    return path


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
            path = Path(argument.split(":")[-1].split("@")[0])
            name = path.stem if path.suffix in (".safetensors", ".json") else path.name
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
