"""What `hf:`, `ms:`, `toy:` and a path mean."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from mergecli.runtime.errors import UsageError, did_you_mean

CHAIN_STATE = ".state.safetensors"
"""The end of the name of what a chain remembers, which stands beside the model `NAME.safetensors` or `NAME`."""

Kind = Literal["hf", "ms", "toy", "path"]

HUBS = {"hf": "Hugging Face", "ms": "ModelScope"}
DEFAULT_BRANCH = {"hf": "main", "ms": "master"}


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
    leave_out: tuple[str, ...] = ()
    """Beginnings of names of tensors that are not read, such as heads that the base does not have."""
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
            hub = f"`{prefix}:org/name` or `{prefix}:org/name@revision`"
            raise UsageError(f"source `{text}`: expected {'`toy:name`' if prefix == 'toy' else hub}")
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


def is_safe(path: str) -> bool:
    """Whether a path inside a repository stays inside, on every system, when it is joined to a folder."""
    return not any(part in ("", ".", "..") or set(part) & set("\\:\0") for part in path.split("/"))


def is_commit(text: str) -> bool:
    """Whether a text is a commit's hexadecimal digits, or the first of them."""
    return bool(re.fullmatch(r"[0-9a-f]{7,64}", text))


def checked_inside(path: str) -> str:
    """The path, which stays inside its repository.

    Raises:
        UsageError: it does not stay inside.
    """
    if not is_safe(path):
        raise UsageError(
            f"`{path}`: expected a file or folder inside the repository, such as `vision/model.safetensors`"
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
        # Lightning calls its files `epoch=3-step=1000.safetensors`
        is_file = equals and (_lies_there(argument) or _lies_there(argument.rpartition("#")[0]))
        if is_file and name and "/" not in name and _lies_there(source):
            raise UsageError(
                f"`{argument}`: is a file, and so is {source}",
                f"write `./{argument}` for the first, `{name}=./{source}` for the second",
            )
        if not equals or is_file or "/" in name:
            source = argument
            whole, _, task = argument.rpartition(".safetensors#")
            path = Path((whole or argument).split(":")[-1].split("@")[0])
            name = path.stem if path.suffix in (".safetensors", ".json") else path.name
            name = f"{path.name}-{task}" if whole else name
            if name in ("model", "model.safetensors.index"):
                name = path.absolute().parent.name
        if not argument.strip():
            parse_source(argument, Path())
        if not name or not source:
            raise UsageError(
                f"`{argument}`: lacks {'a source' if name else 'a name'}: expected `NAME=SOURCE`",
                "" if name else f"write `NAME={source}`",
            )
        if name in sources:
            raise UsageError(
                f"two models are called `{name}`: {sources[name]} and {source}",
                "write `NAME=SOURCE`, each with a name of its own",
            )
        sources[name] = source
    return sources


def _lies_there(path: str) -> bool:
    return bool(path) and os.path.exists(os.path.expanduser(path))  # noqa: PTH110, PTH111
