"""What recipes and sources need of hubs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergecli.clip import tasks
from mergecli.errors import UsageError, did_you_mean
from mergecli.lock import Key, key_of
from mergecli.parquet_names import VALIDATION_NAMES
from mergecli.recipe import Recipe
from mergecli.sources import HUBS, Source, parse_source

KINDS = ("models", "data")
"""What `--only` may be."""
PLATFORMS = {"hf": "hf", "huggingface": "hf", "ms": "ms", "modelscope": "ms"}
"""What `--platform` may be -> the prefix of its sources."""


@dataclass(frozen=True)
class Need:
    """One source, and what of it is used."""

    source: Source
    """As it is written."""
    config: str | None = None
    """For data sets: the configuration."""
    splits: tuple[str, ...] = ()
    """For data sets: splits that must be there."""
    wanted: tuple[str, ...] = ()
    """For data sets: splits that are taken if they are there."""


def named(source: Source) -> str:
    """The source as the command line writes it, where data sets are told by their names."""
    return (
        str(source).replace(":", ":datasets/", 1) if source.is_data and source.kind in HUBS else str(source)
    )


def platform_of(name: str | None) -> str | None:
    """The prefix of a platform's sources; None if none was named."""
    if name is not None and name.lower() not in PLATFORMS:
        raise UsageError(
            f"--platform: expected one of {', '.join(PLATFORMS)}, got `{name}`{did_you_mean(name, PLATFORMS)}"
        )
    return PLATFORMS[name.lower()] if name else None


def sought(source: Source, platform: str | None) -> Source:
    """The source as it is called on the platform; `ms:` sources stay where they are."""
    plain = Source(source.kind, source.name, source.revision, inside=source.inside, is_data=source.is_data)
    if platform == "ms" and source.kind == "hf":
        return replace(plain, kind="ms", name=source.modelscope or source.name)
    return plain


def parse(text: str) -> Source:
    """A source of the command line: as in recipes, and `hf:datasets/org/name` for a data set."""
    prefix, _, rest = text.partition(":")
    if prefix in HUBS and rest.removeprefix("//").startswith("datasets/"):
        plain = parse_source(f"{prefix}:{rest.removeprefix('//').removeprefix('datasets/')}", Path())
        return replace(plain, is_data=True)
    return parse_source(text, Path())


def of_source(source: Source) -> Need:
    """What a source named by itself needs; of a data set all the usual splits."""
    return Need(source, wanted=("train", "test", *VALIDATION_NAMES) if source.is_data else ())


def of_recipe(recipe: Recipe, only: Sequence[str]) -> list[Need]:
    """What a recipe needs: base, models and adapters, and the data of its tasks; toys and paths need nothing."""
    found: list[Need] = []
    if "models" in only:
        for source in (*([recipe.base] if recipe.base else []), *recipe.tuned.values()):
            found += [Need(each) for each in (source, source.adapter) if each]
    if "data" in only:
        for name in tasks.expand(recipe.eval_tasks, recipe) if recipe.eval_tasks else _tasks_of(recipe):
            task = tasks.find(name, recipe)
            found.append(
                Need(
                    replace(task.data, is_data=True), task.config, (task.split,),
                    (task.train_split, *recipe.splits, *VALIDATION_NAMES),
                )
            )  # fmt: skip
    return merged(found)


def merged(needs: Iterable[Need]) -> list[Need]:
    """One need for each source, in order, with the splits of all."""
    found: dict[Key, Need] = {}
    for need in needs:
        key = key_of(need.source)
        before = found.get(key, need)
        found[key] = replace(
            need,
            splits=tuple(dict.fromkeys((*before.splits, *need.splits))),
            wanted=tuple(dict.fromkeys((*before.wanted, *need.wanted))),
        )
    return list(found.values())


def _tasks_of(recipe: Recipe) -> list[str]:
    """The models of a recipe that are called after a task: those are what is evaluated without `[eval].tasks`."""
    found: list[str] = []
    for name in recipe.tuned:
        with contextlib.suppress(UsageError):
            found.append(tasks.find(name, recipe).name)
    return found
