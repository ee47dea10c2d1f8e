"""The merging methods; this folder is their registry: a file's name is its method's name in recipes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergecli.methods._base import KINDS, DataDriven, LayerLine, Method, PerTensor, TwoPass
from mergecli.methods._calibrated import measured_by
from mergecli.methods._layers import about_layers, end_of, gradient_problem, matcher, may_differ, why_alike
from mergecli.methods._mixture import Mixture
from mergecli.methods._modifier import Modifier
from mergecli.methods._settings import Setting, meant_setting, setting_problems, settings_of, settled
from mergecli.runtime.errors import UsageError, did_you_mean, nearest, quoted, toml_text

__all__ = [
    "KINDS", "DataDriven", "Method", "Modifier", "PerTensor", "Setting", "SettingsError", "TwoPass", "about_layers", "create", "find", "key_prefixes", "may_differ",
    "meant_setting", "name_of", "names", "recipe_table", "settings", "table_of",
]  # fmt: skip


@functools.cache
def names() -> tuple[str, ...]:
    """Every method's name, sorted."""
    files = Path(__file__).parent.glob("*.py")
    return tuple(sorted(file.stem for file in files if not file.stem.startswith("_")))


def find(name: str) -> type[Method]:
    """The class of the method called `name`.

    Raises:
        UsageError: there is none, the message suggests the nearest; or its file is not complete.
    """
    if name not in names():
        raise UsageError(f"unknown method `{name}`{_meant(name)}", "`mergecli methods` lists them")
    module = importlib.import_module(f"mergecli.methods.{name}")
    own = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Method) and each.__module__ == module.__name__
    ]
    file = f"mergecli/methods/{name}.py"
    if len(own) != 1:
        raise UsageError(f"{file}: expected one class that is a method, got {len(own)}")
    if lacking := [f"`{each}`" for each in ("title", "paper") if not hasattr(own[0], each)]:
        raise UsageError(f"{file}: `{own[0].__name__}` lacks {' and '.join(lacking)}")
    return own[0]


def _meant(name: str) -> str:
    """` (did you mean `x`?)` for the method that papers or other tools call so, or of nearest name; or an empty string."""
    kinds = {each: find(each) for each in names()}
    known = {each: f"`{each}`" for each in kinds}
    for each, kind in kinds.items():
        for other, setting in kind.also_called.items():
            known[other] = f"`{each}` with `method.{setting}`" if setting else known[each]
    plain = "_".join(re.findall(r"[a-z0-9]+", name.lower().replace("+", " plus"))).removesuffix("_merging")
    pairs = {  # mergekit and FusionBench have a name for each pair, such as `dare_ties`
        pair: f"`{modifier}` with `method.of={each}`"
        for modifier, kind in kinds.items()
        for each in kinds
        for pair in (f"{modifier}_{each}", f"{each}_{modifier}")
        if issubclass(kind, Modifier)
    }
    found = known.get(plain) or pairs.get(plain) or known.get(nearest(plain, known))
    return f" (did you mean {found}?)" if found else ""


@functools.cache
def key_prefixes() -> tuple[str, ...]:
    """What keys begin with, in files of any method, that are no names of a tower's tensors; sorted."""
    kinds = [find(name) for name in names()]
    return tuple(sorted({each for kind in kinds if issubclass(kind, Mixture) for each in kind.prefixes}))


def settings(name: str) -> Mapping[str, Setting]:
    """The settings of the method called `name`, with types, defaults and documentation."""
    return settings_of(find(name))


class SettingsError(UsageError):
    """A method cannot be as it was asked for: its name, or some of its settings."""

    def __init__(self, problems: Sequence[tuple[str, str]], hint: str = "") -> None:
        super().__init__("\n".join(f"`method.{key}`: {what}" for key, what in problems), hint)
        self.problems = tuple(problems)
        """(setting or `name`, what is wrong) for everything that is."""


def create(name: str, values: Mapping[str, Any], tasks: tuple[str, ...] | None = None) -> Method:
    """The method with these settings, and those by layer under `layers`.

    Args:
        tasks: the names of the models to merge, where they are known: some settings must fit them.

    Raises:
        SettingsError: unknown method, or settings that are unknown, missing, ill-valued or unfit; with all of them.
    """
    try:
        method = find(name)
    except UsageError as error:
        raise SettingsError([("name", error.message)], error.hint) from error
    values, lines = dict(values), values.get("layers", ())
    values.pop("layers", None)
    wrong = setting_problems(method, values)
    missing = [key for key, what in wrong if what.startswith("is missing")]
    hint = f"give it with `--set method.{missing[0]}=...`" if missing else ""
    inner: dict[str, Any] = {}
    for key, table in _inner(method, values).items():
        try:
            inner[key] = _changeable(table.pop("name"), table, tasks)
        except SettingsError as error:
            wrong += [(f"{key}.{each}", what) for each, what in error.problems]
            hint = hint or error.hint
    if not wrong and tasks is not None:
        wrong = method.check(tasks, {**values, **_inner(method, values)})
    if wrong:
        raise SettingsError(wrong, hint)
    known = settings_of(method)
    made = method(**{key: settled(value, known[key].kind) for key, value in values.items()} | inner)
    return dataclasses.replace(made, layers=_layers(made, values, lines, tasks)) if lines != () else made


def _layers(
    method: Method, values: Mapping[str, Any], lines: object, tasks: tuple[str, ...] | None
) -> tuple[LayerLine, ...]:
    """The `[[method.layers]]` of a method with these settings; those at the end that change nothing are left out.

    Raises:
        SettingsError: all that is wrong with them.
    """
    name = name_of(method)
    if not isinstance(lines, list | tuple) or not all(isinstance(each, Mapping) for each in lines):
        raise SettingsError([("layers", f"expected a list of tables, got {toml_text(lines)}")])
    if why := why_alike(type(method)):
        raise SettingsError([("layers", f"`{name}` {why}, which has no settings by layer")])
    wrong: list[tuple[str, str]] = []
    found: list[LayerLine] = []
    for number, each in enumerate(lines):
        try:
            found.append(_line(method, values, dict(each), tasks))
        except SettingsError as error:
            wrong += [(f"layers[{number}].{key}".rstrip("."), what) for key, what in error.problems]
    if wrong:
        raise SettingsError(wrong)
    while found and found[-1].keep is None and found[-1].first == method == found[-1].last:
        found.pop()
    return tuple(found)


def _line(
    method: Method, values: Mapping[str, Any], table: dict[str, Any], tasks: tuple[str, ...] | None
) -> LayerLine:
    """One of the `[[method.layers]]`."""
    name, known = name_of(method), settings_of(type(method))
    match, keep = table.pop("match", None), table.pop("keep", None)
    patterns = [match] if isinstance(match, str) else match
    wrong: list[tuple[str, str]] = []
    if (
        not isinstance(patterns, list | tuple)
        or not patterns
        or not all(isinstance(each, str) for each in patterns)
    ):
        wrong.append(("match", f'expected a pattern such as "*.layers.{{0-3}}.mlp.*", got {_written(match)}'))
        patterns = []
    for each in patterns:
        try:
            matcher(each)
        except ValueError as error:
            wrong.append(("match", f"`{each}`: {error}"))
    if keep is not None:
        if not isinstance(keep, str) or (tasks is not None and keep not in ("base", *tasks)):
            near = did_you_mean(str(keep), ("base", *(tasks or ())))
            one = f'expected "base" or a model ({quoted(tasks)})' if tasks else 'expected "base" or a model'
            wrong.append(("keep", f"{one}, got {toml_text(keep)}{near}"))
        wrong += [(key, "a line with `keep` copies weights, and has no settings") for key in table]
        table = {}
    fixed = [key for key in table if key in known and key not in may_differ(type(method))]
    for key, value in table.items():
        if key in fixed:
            wrong.append((key, f"cannot differ by layer: `{name}` looks at images with it before it merges"))
        elif problem := gradient_problem(value):
            wrong.append((key, problem))
    if wrong:
        raise SettingsError(wrong)
    ends: list[Method] = []
    for which in ("first", "last"):
        own = {key: end_of(value, which) for key, value in table.items()}
        inner = {
            key: _inner_table(method, values, key, value)
            for key, value in own.items()
            if key in known and known[key].is_method
        }
        ends.append(create(name, {**values, **own, **inner}, tasks))
    return LayerLine(tuple(patterns), keep, table, ends[0], ends[1])


def _inner_table(method: Method, values: Mapping[str, Any], key: str, value: object) -> object:
    """The table of another method in a line: without a name, or with the same one, changes to the method's own."""
    if not isinstance(value, Mapping):
        return value
    own = values.get(key, getattr(method, key))
    if isinstance(own, Method):
        own = {"name": name_of(own), **table_of(own)}
    table = {"name": own} if isinstance(own, str) else dict(own)
    return {**table, **value} if value.get("name", table.get("name")) == table.get("name") else dict(value)


def _written(value: object) -> str:
    return "nothing" if value is None else toml_text(value)


def _changeable(name: str, values: Mapping[str, Any], tasks: tuple[str, ...] | None) -> Method:
    """A method that another may change; raises SettingsError if it is wrong, or none."""
    if name in names() and issubclass(find(name), DataDriven):
        why = "looks at images"
    elif "layers" in values:
        raise SettingsError(
            [("layers", "settings by layer are those of the whole method: `[[method.layers]]`")]
        )
    else:
        method = create(name, values, tasks)
        if isinstance(method, Mixture) and method.is_mixture:
            why = "writes more than one tower"
        elif measured_by(method) is not None:
            why = "looks at images with these settings"
        else:
            return method
    raise SettingsError([("name", f"`{name}` {why}, and cannot be changed by another method")])


def name_of(method: Method) -> str:
    """The method's name in recipes."""
    return type(method).__module__.rsplit(".", 1)[1]


def table_of(method: Method, without: Collection[str] = ()) -> dict[str, Any]:
    """The method's settings, defaults included, as a recipe writes them, but for those of some names and those that no
    number depends on: other methods as tables with their name."""
    left_out = {*without, *method.not_recorded, "layers"}
    fields = [field.name for field in dataclasses.fields(method) if field.name not in left_out]
    values = {name: getattr(method, name) for name in fields}
    return {
        key: {"name": name_of(value), **table_of(value, without)} if isinstance(value, Method) else value
        for key, value in values.items()
        if value is not None
    }


def recipe_table(method: Method) -> dict[str, Any]:
    """The whole of a recipe's `[method]` but the name: the settings, and those by layer."""
    lines = [
        {
            "match": line.match[0] if len(line.match) == 1 else line.match,
            **({} if line.keep is None else {"keep": line.keep}),
            **line.settings,
        }
        for line in method.layers
    ]
    return {**table_of(method), **({"layers": lines} if lines else {})}


def _inner(method: type[Method], values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Setting -> table, for each setting that is given as the table of another method, or as its name alone."""
    given = {
        key: {"name": values[key]} if isinstance(values[key], str) else values[key]
        for key, setting in settings_of(method).items()
        if setting.is_method and key in values
    }
    return {
        key: dict(table)
        for key, table in given.items()
        if isinstance(table, Mapping) and isinstance(table.get("name"), str)
    }
