"""What a caller gives to the verbs, as a recipe that is checked against the methods and tasks of this installation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli

from mergecli import methods
from mergecli.data import tasks
from mergecli.recipe.lock import pin
from mergecli.recipe.schema import Recipe, recipe_in
from mergecli.recipe.toml import Override, RecipeReader, parse_changes
from mergecli.runtime.errors import InputError, UsageError, did_you_mean, quoted
from mergecli.runtime.notes import note
from mergecli.storage.sources import CHAIN_STATE, Source, named_sources, parse_source
from mergecli.storage.store import nearest_path
from mergecli.storage.table_reader import Problem


def recipe_of(
    what: str | Path | Recipe | Mapping[str, str | Path | Mapping[str, str]] | Sequence[str | Path],
    *,
    base: str | Path | Mapping[str, str] | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    changes: Sequence[str] = (),
    overrides: Sequence[Override] = (),
) -> Recipe:
    """The recipe that a caller means.

    `method`, `settings`, `changes` and `overrides` change the recipe in this order, so that the last one counts. Values stay
    what they are: only the text of `changes` is parsed. Sources of a file are pinned as the lock beside it says.

    Args:
        what: a recipe, its file, name -> fine-tuned model, or a list of models, each `[NAME=]SOURCE`.
        base: of models without a recipe.
        method: a name; replaces the method with all its settings.
        settings: of the method.
        changes: `key=value` as for `--set`; paths in them are relative to the current folder, those in the file to its own.
        overrides: values, and the option that each came from.

    Raises:
        InputError: no such file, or its lock is damaged.
        UsageError: everything that is wrong with it, each with its option, or with file, line and key.
    """
    named = [Override("method", {"name": method}, "--method")] if method is not None else []
    given = [Override(f"method.{key}", _plain(value), "settings") for key, value in (settings or {}).items()]
    every = [*named, *given, *parse_changes(changes), *overrides]
    if not isinstance(what, (str, Path, Recipe, Mapping)):
        what = named_sources([str(each) for each in what])
    if base is not None and not isinstance(what, Mapping):
        raise UsageError("a recipe names its base itself", "use `--set base=...` to change it")
    if isinstance(what, Recipe):
        return _changed(what, every)
    if isinstance(what, Mapping):
        values: dict[str, Any] = {"tuned": {name: _toml(source) for name, source in what.items()}}
        if base is not None:
            values["base"] = _toml(base)
        return _read(values, None, "", every)
    path = Path(what)
    text = _text(path)
    return _read(_values(text, path), path, text, every)


def _plain(value: Any) -> Any:
    """Numbers of NumPy and torch, and arrays of them, as those of Python."""
    return value.tolist() if hasattr(value, "tolist") else value


def _changed(known: Recipe, overrides: Sequence[Override]) -> Recipe:
    """A recipe in memory, checked, with another method or other settings."""
    if other := [each.key for each in overrides if each.key.partition(".")[0] != "method"]:
        raise UsageError(
            f"`{other[0]}`: cannot be changed in a recipe that is no file", "use `dataclasses.replace`"
        )
    reader = RecipeReader()
    if overrides:
        table = {} if known.method is None else {"method": {"name": known.method, **known.settings}}
        for each in overrides:
            reader.override(table, each)
        new = recipe_in(table, None, reader)
        known = replace(known, method=new.method, settings=new.settings)
    _check(known, reader)
    reader.refuse("the recipe")
    return known


def _read(values: dict[str, Any], path: Path | None, text: str, overrides: Sequence[Override]) -> Recipe:
    reader = RecipeReader(path.parent) if path else RecipeReader(naming="write `NAME=SOURCE`")
    for each in overrides:
        reader.override(values, each)
    recipe = pin(recipe_in(values, path, reader))
    _check(recipe, reader)
    reader.refuse(str(path or "command line"), text)
    return recipe


def _check(recipe: Recipe, reader: RecipeReader) -> None:
    """Adds what is wrong with the method, its settings and the tasks, but for keys that have a problem already."""
    problems = reader.values.problems
    broken = {problem.key for problem in problems}
    problems += [each for each in _problems(recipe) if each.key not in broken]


def _problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.method is not None:
        try:
            _ = recipe.built
        except methods.SettingsError as error:
            yield from (Problem(f"method.{key}", what, error.hint) for key, what in error.problems)
    for key, what in tasks.problems(recipe):
        yield Problem(key, what)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        near = nearest_path(path, (".toml",))
        raise InputError(
            f"{path}: no such recipe" + (f" (did you mean `{near}`?)" if near else "")
        ) from error
    except IsADirectoryError as error:
        raise UsageError(f"{path}: is a folder, a recipe (TOML) was expected") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: a recipe is UTF-8 text, byte {error.start} is not") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read: {(error.strerror or '').lower()}") from error


def _values(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}: not TOML: {error.msg.lower()}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: has a number that is too long, or tables nested too deeply") from error


def _toml(source: str | Path | Mapping[str, str]) -> str | dict[str, str]:
    return dict(source) if isinstance(source, Mapping) else str(source)


def _without_states(sources: Sequence[Source]) -> list[Source]:
    """The sources but for what chains remember, where the models beside it are among them too: a shell's pattern names both."""
    models = {
        source.path.parent / source.path.name.removesuffix(".safetensors")
        for source in sources
        if source.path
    }

    def is_state(source: Source) -> bool:
        path = source.path
        return bool(
            path
            and path.name.endswith(CHAIN_STATE)
            and path.with_name(path.name.removesuffix(CHAIN_STATE)) in models
        )

    if left_out := [str(source) for source in sources if is_state(source)]:
        note(f"left out {quoted(left_out)}: what a chain remembers beside its model is no model")
    return [source for source in sources if not is_state(source)]


def named_models(
    checkpoints: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    known: Recipe | None,
    only: Sequence[str],
    *,
    with_base: bool = True,
) -> list[tuple[str, Source]]:
    """Name and source of each checkpoint that a call means: those it names, or else the recipe's models.

    Raises:
        UsageError: there are none, or no model of such a name.
    """
    if checkpoints and only:
        raise UsageError(
            "--model: chooses among the recipe's models, and checkpoints were named too",
            "leave out one of the two",
        )
    leave_out = known.leave_out if known else ()
    if isinstance(checkpoints, Mapping):
        parsed = {name: parse_source(str(source), Path()) for name, source in checkpoints.items()}
        return [(name, replace(source, leave_out=leave_out)) for name, source in parsed.items()]
    if checkpoints:
        several = [checkpoints] if isinstance(checkpoints, (str, Path)) else checkpoints
        sources = [replace(parse_source(str(each), Path()), leave_out=leave_out) for each in several]
        sources = _without_states(sources)
        return [(Path(source.name).name.removesuffix(".safetensors"), source) for source in sources]
    models = dict(known.tuned) if known else {}
    if known and known.base and with_base:
        models = {"base": known.base, **models}
    if not models:
        raise UsageError(
            "there is no checkpoint to evaluate", "name a file, folder or source, or a recipe with `--recipe`"
        )
    for name in only:
        if name not in models:
            raise UsageError(f"the recipe has no model `{name}`{did_you_mean(name, models)}")
    return [(name, source) for name, source in models.items() if not only or name in only]
