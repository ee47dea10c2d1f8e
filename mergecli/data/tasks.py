"""The tasks that towers are evaluated on: class names, prompts and the source of the images. Imports no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from mergecli.data.tables import Columns
from mergecli.runtime.errors import UsageError, did_you_mean
from mergecli.storage.sources import Source, parse_source

_PROMPTS = Path(__file__).parent / "prompts"
"""One TOML file for each task; the folder is the registry."""

_REQUIRED_KEYS = ("description", "data", "split", "train_split", "templates", "classes")
_OPTIONAL_KEYS = ("config", "image", "label", "data_names")


@dataclass(frozen=True)
class Task:
    """One image classification task."""

    name: str
    description: str
    data: Source
    config: str | None
    """The configuration of a data set that has several, which is a folder in its repository."""
    split: str
    """The split that is evaluated by default."""
    train_split: str
    image_column: str
    label_column: str
    classes: tuple[str, ...] | None
    """In the order of the labels; None takes the names that the data's ClassLabel gives."""
    templates: tuple[str, ...]
    """Prompts in which `{}` stands for the class name."""
    mapping: tuple[tuple[str, str], ...] | None = None
    """(name in the data, name in the prompts), where the recipe says which is which."""
    match: str = "name"
    """How names of the data are found among `classes`: `name`; `position`; or `own data`, for a built-in task's own data set,
    whose names may be written otherwise as long as none stands at another position."""
    given_columns: tuple[str, ...] = ()
    """Which of `image` and `label` the recipe names: the data must have these columns."""

    @property
    def columns(self) -> Columns:
        """What the columns are called."""
        return Columns(self.image_column, self.label_column, self.given_columns)


@dataclass(frozen=True)
class TaskTable:
    """`[tasks.NAME]` of a recipe: a new task, or changes to a built-in one; None where the table says nothing."""

    data: Source | None = None
    classes: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    split: str | None = None
    train_split: str | None = None
    match: str | None = None
    """`name` matches the names of the data and of the prompts, whatever their order; `position` takes both in their order."""
    names: str | None = None
    """`published`: those of the published models, in their order."""
    image: str | None = None
    """The column of the images, or of their paths."""
    label: str | None = None
    """The column of the labels."""
    mapping: tuple[tuple[str, str], ...] | None = None
    """Made of `classes` where it is a table: (name in the data, name in the prompts)."""


class TasksOfRecipe(Protocol):
    """What a recipe says of tasks; `Recipe` has it."""

    @property
    def tasks(self) -> Mapping[str, TaskTable]: ...

    @property
    def eval_tasks(self) -> tuple[str, ...]: ...

    def pinned(self, source: Source, /) -> Source:
        """The source at the commit that the lock names."""
        ...


@cache
def sets() -> dict[str, tuple[str, ...]]:
    """Name of a set -> its tasks, in order: the sets of `task_sets.toml`, and `toy8`."""
    written = tomllib.loads(_PROMPTS.with_name("task_sets.toml").read_text("utf-8"))
    prefixes = {name: tuple(written["published"][:count]) for name, count in written["first"].items()}
    return {**prefixes, "toy8": _toy_names()}


@cache
def listed() -> dict[str, tuple[str, ...]]:
    """What is to be said of a set -> its tasks: every built-in task once, in the order of `names`."""
    written = tomllib.loads(_PROMPTS.with_name("task_sets.toml").read_text("utf-8"))["listed"]
    about = {name: f"{what}; `mergecli fetch` brings the images" for name, what in written.items()}
    about["toy8"] = "nothing is needed, mergecli draws the images"
    left = list(names())
    found: dict[str, tuple[str, ...]] = {}
    for name, what in about.items():
        found[f"{name}: {what}"] = chosen = tuple(each for each in left if each in sets()[name])
        left = [each for each in left if each not in chosen]
    return {**found, "others": tuple(left)} if left else found


@cache
def names() -> tuple[str, ...]:
    """The names of all built-in tasks: published ones in the order of their tables, then others, then toy tasks."""
    order = list(max(sets().values(), key=len))
    found = sorted(file.stem for file in _PROMPTS.glob("*.toml"))
    found.sort(key=lambda name: order.index(name) if name in order else len(order))
    return (*found, *_toy_names())


def find(name: str, recipe: TasksOfRecipe | None = None) -> Task:
    """The task of that name: a built-in one, with the changes of the recipe's `[tasks.NAME]`, or one defined there.

    Hyphens and underscores are the same, and a hub id stands for its last part: `stanford_cars`,
    `tanganke/stanford_cars` and `stanford-cars` are one task, called `stanford-cars` from here on.

    Raises:
        UsageError: there is no such task, or its table is not complete.
    """
    known = _canonical(name, recipe)
    table = _table(known, recipe)
    if known in names():
        task = _built_in(known)
        task = replace(task, data=recipe.pinned(task.data)) if recipe else task
        return task if table is None else _changed(task, table)
    if table is None:
        raise UsageError(
            f"unknown task `{name}`{did_you_mean(name, [*_known(recipe), *sets()])}",
            "`mergecli tasks` lists the built-in tasks; a `[tasks.NAME]` table in the recipe defines a new one",
        )
    wrong = _table_problems(known, table)
    if wrong or table.data is None or table.templates is None:
        raise UsageError(_lines(wrong), "a new task needs `data` and `templates`")
    return Task(
        name=known,
        description="defined in the recipe",
        data=table.data,
        config=None,
        split=table.split or "test",
        train_split=table.train_split or "train",
        image_column=table.image or "image",
        label_column=table.label or "label",
        classes=table.classes,
        templates=table.templates,
        mapping=table.mapping,
        match=table.match or "name",
        given_columns=_given_columns(table),
    )


def _given_columns(table: TaskTable) -> tuple[str, ...]:
    return tuple(name for name in ("image", "label") if getattr(table, name) is not None)


def published_note(task: str) -> str:
    """Where published models were trained with other names than the data's: which, and what to do; else empty."""
    data_names = _data_names(task)
    if not data_names:
        return ""
    classes = _built_in(task).classes or ()
    others = ", ".join(f"`{name}` as `{classes[label]}`" for label, name in data_names.items())
    return (
        f"published models were trained with {others}. Images are scored by the data's names; "
        f'`names = "published"` under `[tasks.{task}]` scores them as those models were trained.'
    )


def expand(written: Sequence[str], recipe: TasksOfRecipe | None = None) -> tuple[str, ...]:
    """The names of the tasks in a list of tasks and sets, in order, each once.

    Raises:
        UsageError: one of them is neither.
    """
    every = sets()
    found: dict[str, None] = {}
    for name in written:
        defined = recipe is not None and name in recipe.tasks
        for task in every[name] if name in every and not defined else (find(name, recipe).name,):
            found[task] = None
    return tuple(found)


def problems(recipe: TasksOfRecipe) -> list[tuple[str, str]]:
    """The key and what is wrong there, for every problem of the recipe's `[eval].tasks` and `[tasks]`."""
    known = _known(recipe)
    found = [
        ("eval.tasks", f"unknown task `{name}`{did_you_mean(name, [*known, *sets()])}")
        for name in recipe.eval_tasks
        if name not in sets() and _canonical(name, recipe) not in known
    ]
    for name, table in recipe.tasks.items():
        found += _table_problems(_canonical(name, None), table, name)
    return found


def _table_problems(task: str, table: TaskTable, written: str | None = None) -> list[tuple[str, str]]:
    """The key and what is wrong there, for every problem of `[tasks.<written>]`, which defines or changes `task`."""
    key = f"tasks.{written or task}"
    found: list[tuple[str, str]] = []
    if task not in names():
        found += [
            (key, f"lacks `{lacking}`")
            for lacking in ("data", "templates")
            if getattr(table, lacking) is None
        ]
    if table.templates is not None and not table.templates:
        found.append((f"{key}.templates", "is empty"))
    for template in table.templates or ():
        if template.count("{}") != 1:
            found.append((f"{key}.templates", f"expected `{{}}` once, for the class name, got `{template}`"))
    if table.match not in (None, "name", "position"):
        found.append((f"{key}.match", f"expected `name` or `position`, got `{table.match}`"))
    if table.match is not None and table.mapping is not None:
        found.append((f"{key}.match", "`classes` says already which name is which"))
    if table.names is not None:
        if table.names != "published":
            found.append((f"{key}.names", f"expected `published`, got `{table.names}`"))
        elif task not in names():
            found.append((f"{key}.names", "only built-in tasks have published names"))
        elif table.classes is not None or table.match is not None:
            other = "classes" if table.classes is not None else "match"
            found.append((f"{key}.names", f"does not go with `{other}`: each says which names are used"))
    if table.classes is not None and not table.classes:
        found.append((f"{key}.classes", "is empty"))
    seen: set[str] = set()
    for name in table.classes or ():
        if not name.strip():
            found.append((f"{key}.classes", "a class without a name"))
        elif name in seen:
            found.append((f"{key}.classes", f"`{name}` stands there twice"))
        seen.add(name)
    return found


def _lines(problems: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"`{key}`: {what}" for key, what in problems)


def _changed(task: Task, table: TaskTable) -> Task:
    """The built-in task with the changes of the recipe's table."""
    wrong = _table_problems(task.name, table)
    if wrong:
        raise UsageError(_lines(wrong))
    return replace(
        task,
        data=table.data or task.data,
        config=None if table.data else task.config,
        split=table.split or task.split,
        train_split=table.train_split or task.train_split,
        image_column=table.image or task.image_column,
        label_column=table.label or task.label_column,
        classes=table.classes or task.classes,
        templates=table.templates or task.templates,
        mapping=table.mapping,
        match="position" if table.names and _data_names(task.name) else _match(task, table),
        given_columns=_given_columns(table),
    )


def _match(task: Task, table: TaskTable) -> str:
    """A built-in task's names may be written otherwise than its own data's; those of other data are matched by name."""
    if table.match is not None:
        return table.match
    return task.match if table.data is None and table.classes is None else "name"


def _table(task: str, recipe: TasksOfRecipe | None) -> TaskTable | None:
    """The recipe's table for a task, under any spelling of its name."""
    if recipe is None:
        return None
    return next((table for name, table in recipe.tasks.items() if _canonical(name, recipe) == task), None)


def _canonical(name: str, recipe: TasksOfRecipe | None) -> str:
    """The one spelling of a built-in task's name; any other name unchanged."""
    built_in = names()
    if name in built_in or (
        recipe is not None and name in recipe.tasks and _plain(name) not in map(_plain, built_in)
    ):
        return name
    return next((task for task in built_in if _plain(task) == _plain(name)), name)


def _plain(name: str) -> str:
    return name.rpartition("/")[2].replace("_", "-").lower()


def _known(recipe: TasksOfRecipe | None) -> list[str]:
    return [*names(), *(recipe.tasks if recipe else ())]


def _toy_names() -> tuple[str, ...]:
    from mergecli.data.toy import TASKS

    return tuple(TASKS)


@cache
def _built_in(name: str) -> Task:
    """A built-in task, unchanged by any recipe."""
    if name in _toy_names():
        from mergecli.data.toy import TASKS

        toy = TASKS[name]
        return Task(
            name=name,
            description=toy.description,
            data=Source(kind="toy", name=name, revision=None, path=None),
            config=None,
            split="test",
            train_split="train",
            image_column="image",
            label_column="label",
            classes=_strings(toy.classes),
            templates=_strings(toy.templates),
        )
    row = _row(name)
    return Task(
        name=name,
        description=row["description"],
        data=replace(parse_source(row["data"], _PROMPTS), is_data=True),
        config=row.get("config"),
        split=row["split"],
        train_split=row["train_split"],
        image_column=row.get("image", "image"),
        label_column=row.get("label", "label"),
        classes=_strings(row["classes"]),
        templates=_strings(row["templates"]),
        match="own data",
    )


def _row(name: str) -> dict[str, Any]:
    """What the file of a built-in task says.

    Raises:
        UsageError: everything that is wrong with it.
    """
    file = f"mergecli/data/prompts/{name}.toml"
    try:
        row: dict[str, Any] = tomllib.loads((_PROMPTS / f"{name}.toml").read_text("utf-8"))
    except ValueError as error:
        raise UsageError(f"{file}: not TOML: {str(error).lower()}") from error
    known = (*_REQUIRED_KEYS, *_OPTIONAL_KEYS)
    found = [f"`{key}`: unknown key{did_you_mean(key, known)}" for key in row if key not in known]
    found += [f"lacks `{key}`" for key in _REQUIRED_KEYS if key not in row]
    if not found:
        table = TaskTable(classes=_strings(row["classes"]), templates=_strings(row["templates"]))
        found = [f"`{key.rpartition('.')[2]}`: {what}" for key, what in _table_problems(name, table)]
    if found:
        raise UsageError("\n".join(f"{file}: {what}" for what in found))
    return row


@cache
def _data_names(task: str) -> dict[int, str]:
    """Label -> name in the data of a built-in task, where published models were trained with another."""
    row = _row(task) if (_PROMPTS / f"{task}.toml").is_file() else {}
    return {int(label): str(name) for label, name in row.get("data_names", {}).items()}


def _strings(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


def digest(strings: Iterable[str]) -> str:
    """16 hex digits of the SHA-256 of class names, or of templates."""
    return sha256("\n".join(strings).encode()).hexdigest()[:16]
