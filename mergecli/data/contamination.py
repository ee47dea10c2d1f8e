"""Checkpoints that were trained on images that they are evaluated on: what is known of them is in `contaminated.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mergecli.data.tasks import find, names
from mergecli.storage.checkpoint import Checkpoint
from mergecli.storage.metadata import inputs_of, made_of
from mergecli.storage.sources import Source

_FILE = Path(__file__).with_name("contaminated.toml")


@dataclass(frozen=True)
class Contaminated:
    """A group of checkpoints that were trained on test images of a task."""

    task: str
    sources: tuple[str, ...]
    """Patterns, in lower case."""
    commits: tuple[str, ...]
    clean: tuple[str, ...]
    digests: tuple[str, ...]
    why: str


class Finding(NamedTuple):
    """A checkpoint that belongs to a group, or may belong to it."""

    group: Contaminated
    certain: bool

    @property
    def text(self) -> str:
        """What a warning says after the checkpoint's name."""
        trained = "was trained" if self.certain else "may have been trained"
        return f"{trained} on test images of `{self.group.task}`: {self.group.why}"


class Implausible(NamedTuple):
    """An accuracy on a task that no clean model is known to reach."""

    above: float
    why: str


@cache
def groups() -> tuple[Contaminated, ...]:
    """All that are known."""
    lists = ("sources", "commits", "clean", "digests")
    return tuple(
        Contaminated(**entry | {key: tuple(entry[key]) for key in lists})
        for entry in _written()["checkpoint"]
    )


@cache
def implausible() -> dict[str, Implausible]:
    """Task -> the accuracy that is too good."""
    return {task: Implausible(**each) for task, each in _written()["implausible"].items()}


def is_test(task: str, split: str | None) -> bool:
    """Whether a split, None for the task's own, has the test images of a built-in task."""
    return split in (None, find(task).split) if task in names() else False


@cache
def _written() -> dict[str, Any]:
    return tomllib.loads(_FILE.read_text("utf-8"))


def findings_of(source: Source, opened: Checkpoint, tasks: Collection[str] | None = None) -> list[Finding]:
    """The groups that an open checkpoint belongs to, by where it came from and by what it says that it was merged from."""
    adapter, origin = source.adapter, source.pinned
    origins = [str(each) for each in (source, origin, adapter, opened.path) if each is not None]
    digests = set(inputs_of(opened.metadata).values())
    if any(group.digests for group in groups()):
        digests.add(opened.digest())
    return list(findings([*origins, *made_of(opened.metadata)[1].values()], digests, tasks))


def findings(
    origins: Iterable[str],
    digests: Collection[str] = (),
    tasks: Collection[str] | None = None,
    known: Sequence[Contaminated] | None = None,
) -> Iterator[Finding]:
    """The groups that a checkpoint, or a model that it was merged from, belongs to.

    Args:
        origins: sources and paths of it and of the models in it; a commit may stand in them.
        digests: theirs.
        tasks: only the groups about these; None for all.
        known: by default `groups()`.
    """
    named = [each.lower() for each in origins]
    for group in groups() if known is None else known:
        if tasks is not None and group.task not in tasks:
            continue
        like = [
            each
            for each in named
            if any(fnmatchcase(each, pattern) for pattern in group.sources)
            and not any(commit in each for commit in group.clean)
        ]
        certain = any(commit in each for commit in group.commits for each in named)
        if certain or set(digests) & set(group.digests):
            yield Finding(group, certain=True)
        elif like:
            yield Finding(group, certain=False)
