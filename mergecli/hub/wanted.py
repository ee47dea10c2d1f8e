"""What recipes and sources need of hubs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergecli.data import tasks
from mergecli.data.splits import VALIDATION_NAMES
from mergecli.hub import wanted as wanted_by
from mergecli.recipe.lock import Entry, Key, Lock, key_of, lock_of
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import UsageError, did_you_mean, listed
from mergecli.storage.sources import HUBS, Source, parse_source

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


@dataclass(frozen=True)
class Wish:
    """One argument: what it needs, and its lock."""

    needs: list[Need]
    """Paths and toys too."""
    recipe: Recipe | None = None
    lock: Lock | None = None


@dataclass(frozen=True)
class Wishes:
    """All arguments."""

    each: tuple[Wish, ...]
    needs: dict[Key, Need] = field(default_factory=dict[Key, Need])
    """What hubs are needed for, each source once."""
    locked: dict[Key, Entry] = field(default_factory=dict[Key, Entry])
    """What the locks say of them."""


def gathered(
    given: Sequence[str | Path | Recipe],
    changes: Sequence[str],
    only: Sequence[str],
    locked: bool,
    platform: str | None,
) -> Wishes:
    """What the arguments need.

    Raises:
        UsageError: an argument is wrong, or `locked` is set and a lock is missing, lacks a source, or differs from
            another about it.
    """
    wishes = tuple(_wish(each, changes, only, locked) for each in given)
    entries: dict[Key, Entry] = {}
    problems: list[UsageError] = []
    for wish in wishes:
        known = wish.lock.entries if wish.lock else {}
        for need in wish.needs:
            key = key_of(need.source)
            if need.source.kind not in HUBS:
                continue
            try:
                entry = locked_entry(need, known, platform) if locked else known.get(key)
            except UsageError as error:
                problems.append(error)
                continue
            if entry and locked and entries.get(key, entry).commit != entry.commit:
                raise UsageError(
                    f"--locked: the recipes' locks have {wanted_by.named(need.source)} at different commits"
                )
            if entry:
                entries[key] = entry
    if problems:
        lines = [each.message for each in problems]
        raise UsageError(
            "--locked: " + (lines[0] if len(lines) == 1 else "\n" + listed(lines, 20)), problems[0].hint
        )
    every = wanted_by.merged(need for wish in wishes for need in wish.needs)
    return Wishes(wishes, {key_of(need.source): need for need in every if need.source.kind in HUBS}, entries)


def _wish(each: str | Path | Recipe, changes: Sequence[str], only: Sequence[str], locked: bool) -> Wish:
    if not isinstance(each, Recipe) and Path(each).suffix != ".toml":
        if locked:
            raise UsageError(f"--locked: `{each}` has no lock", "only recipes have one")
        return Wish([wanted_by.of_source(wanted_by.parse(str(each)))])
    recipe = recipe_of(each, changes=changes)
    needs = wanted_by.of_recipe(recipe, only)
    lock = lock_of(recipe)
    if locked and lock is None and any(need.source.kind in HUBS for need in needs):
        raise UsageError(
            f"--locked: {recipe.path or 'the recipe'} has no lock",
            "`mergecli fetch` without `--locked` writes one",
        )
    return Wish(needs, recipe, lock)


def locked_entry(need: Need, lock: Mapping[tuple[bool, str], Entry], platform: str | None) -> Entry:
    """The lock's entry for a need.

    Raises:
        UsageError: it has none, or one of another platform than the one asked for.
    """
    entry = lock.get((need.source.is_data, str(need.source)))
    if entry is None:
        raise UsageError(
            f"{wanted_by.named(need.source)}: is not in the lock",
            "`mergecli fetch` without `--locked` adds it",
        )
    if platform and entry.origin.kind != platform and need.source.kind == "hf":
        raise UsageError(
            f"{wanted_by.named(need.source)}: the lock has it from {HUBS[entry.origin.kind]}, whose commits {HUBS[platform]} does not know",
            "leave out `--platform`, or `--locked`",
        )
    return entry
