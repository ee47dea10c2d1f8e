"""What was asked for: recipes with their locks, and sources, as needs that each stand there once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mergecli.catalogue import read_recipe
from mergecli.errors import UsageError, listed
from mergecli.hub import needs as wanted_by
from mergecli.hub.needs import Need
from mergecli.lock import Entry, Key, Lock, key_of, lock_of
from mergecli.recipe import Recipe
from mergecli.sources import HUBS


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
    recipe = each if isinstance(each, Recipe) else read_recipe(each, changes)
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
