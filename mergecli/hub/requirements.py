"""What recipes and sources require of hubs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergecli.data import tasks
from mergecli.data.splits import VALIDATION_NAMES
from mergecli.recipe.lock import Key, Lock, LockedSource, key_of, lock_of
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import UsageError, did_you_mean, listed
from mergecli.storage.sources import HUBS, Source, parse_source

KINDS = ("models", "data")
"""What `--only` may be."""
PLATFORMS = {"hf": "hf", "huggingface": "hf", "ms": "ms", "modelscope": "ms"}
"""What `--platform` may be -> the prefix of its sources."""


@dataclass(frozen=True)
class Requirement:
    """One source, and what of it is used."""

    source: Source
    """As it is written."""
    config: str | None = None
    """For data sets: the configuration."""
    splits: tuple[str, ...] = ()
    """For data sets: splits that must be there."""
    wanted: tuple[str, ...] = ()
    """For data sets: splits that are taken if they are there."""

    @property
    def key(self) -> Key:
        """What its source is found by in a lock."""
        return key_of(self.source)


def named(source: Source) -> str:
    """The source as the command line writes it: data sets are `hf:datasets/org/name`."""
    return (
        str(source).replace(":", ":datasets/", 1) if source.is_data and source.kind in HUBS else str(source)
    )


def platform_of(name: str | None) -> str | None:
    """The prefix of a platform's sources; None if none was named. Raises UsageError if there is no such platform."""
    if name is not None and name.lower() not in PLATFORMS:
        raise UsageError(
            f"--platform: expected one of {', '.join(PLATFORMS)}, got `{name}`{did_you_mean(name, PLATFORMS)}"
        )
    return PLATFORMS[name.lower()] if name else None


def on_platform(source: Source, platform: str | None) -> Source:
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


def of_source(source: Source) -> Requirement:
    """What a source named by itself needs; of a data set all the usual splits."""
    return Requirement(source, wanted=("train", "test", *VALIDATION_NAMES) if source.is_data else ())


def of_recipe(recipe: Recipe, only: Sequence[str]) -> list[Requirement]:
    """What a recipe needs: base, models and adapters, and the data of its tasks."""
    found: list[Requirement] = []
    if "models" in only:
        for source in (*([recipe.base] if recipe.base else []), *recipe.tuned.values()):
            found += [Requirement(each) for each in (source, source.adapter) if each]
    if "data" in only:
        for name in tasks.expand(recipe.eval_tasks, recipe) if recipe.eval_tasks else _tasks_of(recipe):
            task = tasks.find(name, recipe)
            found.append(
                Requirement(
                    replace(task.data, is_data=True), task.config, (task.split,),
                    (task.train_split, *recipe.splits, *VALIDATION_NAMES),
                )
            )  # fmt: skip
    return combined(found)


def combined(requirements: Iterable[Requirement]) -> list[Requirement]:
    """One requirement for each source, in order, with the splits of all."""
    found: dict[Key, Requirement] = {}
    for each in requirements:
        before = found.get(each.key, each)
        found[each.key] = replace(
            each,
            splits=tuple(dict.fromkeys((*before.splits, *each.splits))),
            wanted=tuple(dict.fromkeys((*before.wanted, *each.wanted))),
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
class Request:
    """One argument: what it requires, and its lock."""

    requirements: list[Requirement]
    """Paths and toys too."""
    recipe: Recipe | None = None
    lock: Lock | None = None


@dataclass(frozen=True)
class Requests:
    """All arguments."""

    each: tuple[Request, ...]
    requirements: dict[Key, Requirement] = field(default_factory=dict[Key, Requirement])
    """What hubs are needed for, each source once."""
    locked: dict[Key, LockedSource] = field(default_factory=dict[Key, LockedSource])
    """What the locks say of them."""


def gather(
    given: Sequence[str | Path | Recipe],
    changes: Sequence[str],
    only: Sequence[str],
    locked: bool,
    platform: str | None,
) -> Requests:
    """What the arguments require.

    Raises:
        UsageError: an argument is wrong, or `locked` is set and a lock is missing, lacks a source, or differs from
            another about it.
    """
    requests = tuple(_request(each, changes, only, locked) for each in given)
    pairs = [
        (requirement, request.lock or Lock())
        for request in requests
        for requirement in request.requirements
        if requirement.source.kind in HUBS
    ]
    if locked:
        _check_locked(pairs, platform)
    sources = {each.key: found for each, lock in pairs if (found := lock.sources.get(each.key))}
    return Requests(requests, {each.key: each for each in combined(each for each, _ in pairs)}, sources)


def _request(each: str | Path | Recipe, changes: Sequence[str], only: Sequence[str], locked: bool) -> Request:
    if not isinstance(each, Recipe) and Path(each).suffix != ".toml":
        if locked:
            raise UsageError(f"--locked: `{each}` has no lock", "only recipes have one")
        return Request([of_source(parse(str(each)))])
    recipe = recipe_of(each, changes=changes)
    requirements = of_recipe(recipe, only)
    lock = lock_of(recipe)
    if locked and lock is None and any(each.source.kind in HUBS for each in requirements):
        raise UsageError(
            f"--locked: {recipe.path or 'the recipe'} has no lock",
            "`mergecli fetch` without `--locked` writes one",
        )
    return Request(requirements, recipe, lock)


def _check_locked(pairs: Sequence[tuple[Requirement, Lock]], platform: str | None) -> None:
    """Raises UsageError unless each requirement is in its lock, on the platform asked for, and all locks agree."""
    problems: list[tuple[str, str]] = []
    commits: dict[Key, str] = {}
    for each, lock in pairs:
        found = lock.sources.get(each.key)
        if found is None:
            hint = "`mergecli fetch` without `--locked` adds it"
            problems.append((f"{named(each.source)}: is not in the lock", hint))
        elif platform and found.origin.kind != platform and each.source.kind == "hf":
            what = f"the lock has it from {HUBS[found.origin.kind]}, whose commits {HUBS[platform]} does not know"
            problems.append((f"{named(each.source)}: {what}", "leave out `--platform`, or `--locked`"))
        elif commits.setdefault(each.key, found.commit) != found.commit:
            raise UsageError(f"--locked: the recipes' locks have {named(each.source)} at different commits")
    if problems:
        lines = [what for what, _ in problems]
        raise UsageError(
            "--locked: " + (lines[0] if len(lines) == 1 else "\n" + listed(lines, 20)), problems[0][1]
        )
