"""The merging methods; this folder is their registry: a file's name is its method's name in recipes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergecli.methods._base import KINDS, DataDriven, Method, PerTensor, TwoPass
from mergecli.methods._mixture import Mixture
from mergecli.methods._modifier import Modifier
from mergecli.methods._settings import Setting, setting_problems, settings_of, settled
from mergecli.runtime.errors import UsageError, did_you_mean

__all__ = [
    "KINDS", "DataDriven", "Method", "Modifier", "PerTensor", "Setting", "SettingsError", "TwoPass", "create", "find", "key_prefixes", "name_of",
    "names", "settings", "table_of",
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
        raise UsageError(
            f"unknown method `{name}`{did_you_mean(name, names())}", "`mergecli methods` lists them"
        )
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

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__("\n".join(f"`method.{key}`: {what}" for key, what in problems))
        self.problems = tuple(problems)
        """(setting or `name`, what is wrong) for everything that is."""


def create(name: str, values: Mapping[str, Any], tasks: tuple[str, ...] | None = None) -> Method:
    """The method with these settings.

    Args:
        tasks: the names of the models to merge, where they are known: some settings must fit them.

    Raises:
        SettingsError: unknown method, or settings that are unknown, missing, ill-valued or unfit; with all of them.
    """
    try:
        method = find(name)
    except UsageError as error:
        raise SettingsError([("name", error.message)]) from error
    wrong = setting_problems(method, values)
    inner: dict[str, Method] = {}
    for key, table in _inner(method, values).items():
        try:
            inner[key] = _changeable(table.pop("name"), table, tasks)
        except SettingsError as error:
            wrong += [(f"{key}.{each}", what) for each, what in error.problems]
    if not wrong and tasks is not None:
        wrong = method.check(tasks, dict(values))
    if wrong:
        raise SettingsError(wrong)
    known = settings_of(method)
    return method(**{key: settled(value, known[key].kind) for key, value in values.items()} | inner)


def _changeable(name: str, values: Mapping[str, Any], tasks: tuple[str, ...] | None) -> Method:
    """A method that another may change; raises SettingsError if it is wrong, or none."""
    if name in names() and issubclass(find(name), DataDriven):
        why = "looks at images"
    else:
        method = create(name, values, tasks)
        if not (isinstance(method, Mixture) and method.is_mixture):
            return method
        why = "writes more than one tower"
    raise SettingsError([("name", f"`{name}` {why}, and cannot be changed by another method")])


def name_of(method: Method) -> str:
    """The method's name in recipes."""
    return type(method).__module__.rsplit(".", 1)[1]


def table_of(method: Method, without: Collection[str] = ()) -> dict[str, Any]:
    """The method's settings, defaults included, as a recipe writes them, but for those of some names and those that no
    number depends on: other methods as tables with their name."""
    left_out = {*without, *method.not_recorded}
    fields = [field.name for field in dataclasses.fields(method) if field.name not in left_out]
    values = {name: getattr(method, name) for name in fields}
    return {
        key: {"name": name_of(value), **table_of(value, without)} if isinstance(value, Method) else value
        for key, value in values.items()
        if value is not None
    }


def _inner(method: type[Method], values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Setting -> table, for each setting that is given as the table of another method."""
    tables = {
        key: values[key]
        for key, setting in settings_of(method).items()
        if setting.is_method and key in values
    }
    return {
        key: dict(table)
        for key, table in tables.items()
        if isinstance(table, Mapping) and isinstance(table.get("name"), str)
    }
