"""Pools: sets of fine-tuned models whose averages compare with each other; what is known of them is in `pools.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("pools.toml")


@dataclass(frozen=True)
class Pool:
    """Where a published set of models comes from."""

    what: str
    sources: tuple[str, ...]
    """Patterns, in lower case."""
    tables: str
    """What follows the backbone in the names of published tables of its averages."""


@cache
def pools() -> Mapping[str, Pool]:
    """Name -> pool, of those that are known."""
    written = tomllib.loads(_FILE.read_text("utf-8"))
    return {name: Pool(**each | {"sources": tuple(each["sources"])}) for name, each in written.items()}


def pool_of(sources: Iterable[str]) -> str | None:
    """The pool that all of these models are of, by where they come from; None if there is none, or it is not known."""
    found = {_pool_of_one(source.lower()) for source in sources}
    return found.pop() if len(found) == 1 else None


def _pool_of_one(source: str) -> str | None:
    named = (
        name for name, pool in pools().items() if any(fnmatchcase(source, each) for each in pool.sources)
    )
    return next(named, None)
