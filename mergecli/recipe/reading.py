"""Recipes checked against what this installation knows: its methods and its tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergecli import methods
from mergecli.data import tasks
from mergecli.recipe import schema as recipe
from mergecli.recipe.lock import pin
from mergecli.recipe.schema import Recipe
from mergecli.recipe.toml import Problem
from mergecli.runtime.errors import UsageError, did_you_mean
from mergecli.storage.sources import Source, parse_source


def read_recipe(path: str | Path, changes: Sequence[str] = (), method: str | None = None) -> Recipe:
    """The recipe in the file, as the lock beside it has it, with every problem of form, method, settings and tasks in
    one error."""
    return pin(recipe.read(Path(path), changes, method, (_method_problems, _task_problems)))


def recipe_from(
    base: str | Path | Mapping[str, str] | None,
    tuned: Mapping[str, str | Path | Mapping[str, str]],
    changes: Sequence[str] = (),
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    **others: Any,
) -> Recipe:
    """The recipe that a command line or a call without a file means; the same checks."""
    values: dict[str, Any] = {"tuned": {name: _toml(source) for name, source in tuned.items()}, **others}
    if base is not None:
        values["base"] = _toml(base)
    if method is not None:
        values["method"] = {"name": method, **(settings or {})}
    return recipe.build(values, changes=changes, checks=(_method_problems, _task_problems))


def with_method(
    known: Recipe, method: str | None, settings: Mapping[str, Any] | None, changes: Sequence[str] = ()
) -> Recipe:
    """A recipe in memory with another method, or with more settings of its own.

    Raises:
        UsageError: the settings do not fit the method, or there are `changes`, which are for recipe files.
    """
    if changes:
        raise UsageError(
            "`changes` are for recipe files", "use `method` and `settings`, or `dataclasses.replace`"
        )
    if method is not None:
        known = replace(known, method=method, settings=dict(settings or {}))
    elif settings:
        known = replace(known, settings={**known.settings, **settings})
    if wrong := list(_method_problems(known)):
        raise UsageError("\n".join(f"`{problem.key}`: {problem.what}" for problem in wrong))
    return known


def _toml(source: str | Path | Mapping[str, str]) -> str | dict[str, str]:
    return dict(source) if isinstance(source, Mapping) else str(source)


def named_models(
    checkpoints: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    known: Recipe | None,
    only: Sequence[str],
    *,
    with_base: bool = True,
) -> list[tuple[str, Source]]:
    """Name and source of each checkpoint that a call means: those it names, or else the recipe's models."""
    if checkpoints and only:
        raise UsageError("`only` chooses among the recipe's models, and checkpoints were named too")
    if isinstance(checkpoints, Mapping):
        return [(name, parse_source(str(source), Path())) for name, source in checkpoints.items()]
    if checkpoints:
        several = [checkpoints] if isinstance(checkpoints, (str, Path)) else checkpoints
        sources = [parse_source(str(each), Path()) for each in several]
        return [(Path(source.name).name.removesuffix(".safetensors"), source) for source in sources]
    models = dict(known.tuned) if known else {}
    if known and known.base and with_base:
        models = {"base": known.base, **models}
    if not models:
        raise UsageError("no checkpoint to evaluate", "name at least one file, folder or source, or a recipe")
    for name in only:
        if name not in models:
            raise UsageError(f"the recipe has no model `{name}`{did_you_mean(name, models)}")
    return [(name, source) for name, source in models.items() if not only or name in only]


def _method_problems(each: Recipe) -> Iterable[Problem]:
    if each.method is not None:
        tasks = tuple(each.tuned) or None
        found = methods.problems(each.method, each.settings, tasks)
        return [Problem(f"method.{key}", what) for key, what in found]
    return []


def _task_problems(each: Recipe) -> Iterable[Problem]:
    return [Problem(key, what) for key, what in tasks.problems(each)]
