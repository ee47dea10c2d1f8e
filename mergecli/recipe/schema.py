"""What a recipe may say, as frozen dataclasses and as TOML."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from mergecli import methods
from mergecli.data.tasks import TaskTable
from mergecli.methods import Method
from mergecli.recipe.toml import RecipeReader
from mergecli.runtime.errors import UsageError, did_you_mean, nearest, quoted, toml_text
from mergecli.storage.sources import Source
from mergecli.storage.table_reader import TableReader

DTYPES = ("same", "float32", "float16", "bfloat16")
SPACES = ("dense", "core", "knots")
KEYS = (
    "schema", "base", "seed", "dtype", "space", "as_adapter", "rank", "leave_out", "pool", "tuned", "method", "eval", "continual",
    "tasks",
)  # fmt: skip
EVAL_KEYS = ("tasks", "batch_size", "splits")
CONTINUAL_KEYS = ("order", "orders", "seed")


@dataclass(frozen=True)
class Orders:
    """In which orders models arrive one after another."""

    order: tuple[str, ...] = ()
    """Every model once; empty where it is not given."""
    orders: int | None = None
    """So many orders, drawn at random; None for one order, that of `order` or else of `[tuned]`."""
    seed: int = 42
    """Of the first drawn order; each next one has the next number."""

    def of(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """The orders of these models, each as Python's `random.Random(seed + number).shuffle` of the list gives it."""
        if self.orders is None:
            return (self.order or tuple(names),)
        found: list[tuple[str, ...]] = []
        for number in range(self.orders):
            drawn = list(names)
            random.Random(self.seed + number).shuffle(drawn)
            found.append(tuple(drawn))
        return tuple(found)


@dataclass(frozen=True)
class Recipe:
    """What to merge, how, and on what to evaluate it."""

    path: Path | None = None
    base: Source | None = None
    tuned: Mapping[str, Source] = field(default_factory=dict[str, Source])
    """Task -> fine-tuned model; the order of every sum."""
    pool: str | None = None
    """Which published pool the models are of, or another name for them: averages of two pools do not compare."""
    leave_out: tuple[str, ...] = ()
    """Beginnings of names of tensors that the models have and the base has not, such as heads, and that are not read."""
    seed: int = 0
    names_seed: bool = False
    """Whether it is written, and 0 not what nobody has chosen."""
    dtype: str = "same"
    space: str = ""
    """What a method sees of adapters: `dense`, their weights; `core` or `knots`, coordinates of low rank. Empty: `core` where
    all models are adapters and the output is one, else `dense`."""
    as_adapter: bool = False
    """Whether the output is an adapter."""
    rank: int | None = None
    """The most that the rank of such an output may be; None: as much as the merge has."""
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The method's settings as written, without defaults."""
    eval_tasks: tuple[str, ...] = ()
    """Names of tasks or of sets of tasks; empty means the tasks of `tuned`."""
    splits: tuple[str, ...] = ()
    """Splits of the tasks' data that `fetch` brings besides their own for training and testing."""
    batch_size: int = 128
    continual: Orders = Orders()
    tasks: Mapping[str, TaskTable] = field(default_factory=dict[str, TaskTable])
    pins: Mapping[tuple[bool, str], Source] = field(default_factory=dict[tuple[bool, str], Source])
    """What the lock beside the recipe says: (whether it is a data set, a source as it is written) -> that at a commit."""

    @cached_property
    def built(self) -> Method:
        """The method with its settings, which are checked here and nowhere else: once for a recipe.

        Raises:
            UsageError: no method is named.
            SettingsError: it is unknown, or its settings are wrong.
        """
        if self.method is None:
            raise UsageError(
                "no method is named",
                "name one in `[method]` or with `--method`; `mergecli methods` lists them",
            )
        return methods.create(self.method, self.settings, tuple(self.tuned) or None)

    def pinned(self, source: Source) -> Source:
        """The source as the lock has it."""
        return replace(source, pinned=self.pins.get((source.is_data, str(source)), source.pinned))


def recipe_in(values: dict[str, Any], path: Path | None, reader: RecipeReader) -> Recipe:
    """The recipe that parsed TOML means; what is wrong with it is among the reader's problems, and left out here."""
    read = reader.values
    top = read.table(values, "")
    if (schema := top.get("schema", 1)) != 1 or type(schema) is not int:
        read.wrong(
            "schema", f"expected 1, got {toml_text(schema)}: this recipe is for another version of mergecli"
        )
    method, settings = _method(top["method"], read) if "method" in top else (None, {})
    for name in top.keys() - KEYS:
        read.wrong(name, f"unknown key{_meant(name, method)}")
    evaluation = read.table(top.get("eval", {}), "eval", EVAL_KEYS)
    wanted = evaluation.get("tasks", ())
    leave_out = read.texts(top["leave_out"], "leave_out") if "leave_out" in top else ()
    models = read.table(top.get("tuned", {}), "tuned")
    return Recipe(
        path=path,
        base=reader.source(top["base"], "base") if "base" in top else None,
        tuned={
            reader.name(name, f"tuned.{name}"): replace(source, leave_out=leave_out)
            for name, value in models.items()
            if (source := reader.source(value, f"tuned.{name}"))
        },
        leave_out=leave_out,
        pool=(read.text(top["pool"], "pool") or None) if "pool" in top else None,
        seed=read.whole(top.get("seed", 0), "seed"),
        names_seed="seed" in top,
        dtype=read.one_of(top.get("dtype", "same"), "dtype", DTYPES),
        space=read.one_of(top["space"], "space", SPACES) if "space" in top else "",
        as_adapter=read.flag(top.get("as_adapter", False), "as_adapter"),
        rank=read.whole(top["rank"], "rank", 1) if "rank" in top else None,
        method=method,
        settings=settings,
        eval_tasks=()
        if wanted == ()
        else read.texts([wanted] if isinstance(wanted, str) else wanted, "eval.tasks"),
        splits=read.texts(evaluation["splits"], "eval.splits") if "splits" in evaluation else (),
        batch_size=read.whole(evaluation.get("batch_size", 128), "eval.batch_size", 1),
        continual=_orders(top["continual"], models, read) if "continual" in top else Orders(),
        tasks={
            reader.name(name, f"tasks.{name}"): _task(value, f"tasks.{name}", reader)
            for name, value in read.table(top.get("tasks", {}), "tasks").items()
        },
    )


_OTHER_WORDS = {"base_model": "base", "merge_method": "method", "models": "tuned", "parameters": "method"}
"""What mergekit's recipes call keys."""


def _meant(name: str, method: str | None) -> str:
    """` (did you mean `x`?)` for a key at the top, or for one whose table was left out; else which keys there are."""
    keys = {each: each for each in KEYS} | {each: f"eval.{each}" for each in EVAL_KEYS if each not in KEYS}
    found = _OTHER_WORDS.get(name) or keys.get(nearest(name, keys))
    for each in [method] if method in methods.names() else methods.names():
        if setting := methods.meant_setting(name, methods.settings(each or "")):
            found = found or f"method.{setting}"
    return f" (did you mean `{found}`?)" if found else f"; there are {quoted(KEYS, len(KEYS))}"


def _method(value: object, read: TableReader) -> tuple[str | None, dict[str, Any]]:
    if isinstance(value, str) and value:  # a method's name alone stands for its table
        return value, {}
    settings = dict(read.table(value, "method"))
    if "name" not in settings:
        what = "is missing: expected the name of a method"
        read.wrong("method.name", what, "`--method NAME` gives one; `mergecli methods` lists them")
        return None, settings
    return read.text(settings.pop("name"), "method.name") or None, settings


def _orders(value: object, models: Collection[str], read: TableReader) -> Orders:
    table = read.table(value, "continual", CONTINUAL_KEYS)
    order = read.texts(table["order"], "continual.order") if "order" in table else ()
    seed = read.whole(table["seed"], "continual.seed") if "seed" in table else 42
    orders = read.whole(table["orders"], "continual.orders", 1) if "orders" in table else None
    if "order" in table and orders is not None:
        read.wrong("continual.orders", "there is `order` too: give one of the two")
    elif orders is None and "seed" in table:
        read.wrong("continual.seed", "is for orders that are drawn: say how many with `orders`")
    problems = [
        f"`{name}` is no model of `[tuned]`{did_you_mean(name, models)}"
        for name in order
        if name not in models
    ]
    problems += [f"`{name}` stands there twice" for name in dict.fromkeys(order) if order.count(name) > 1]
    if order and not problems and (left := [name for name in models if name not in order]):
        problems = [f"lacks {quoted(left)}: expected every model once"]
    for problem in problems:
        read.wrong("continual.order", problem)
    return Orders(order, orders, seed)


def _task(value: object, key: str, reader: RecipeReader) -> TaskTable:
    read = reader.values
    texts = ("split", "train_split", "match", "names", "image", "label")
    table = read.table(value, key, ("data", "classes", "templates", *texts))
    data = reader.source(table["data"], f"{key}.data") if "data" in table else None
    classes = table.get("classes")
    mapping = (
        _mapping(cast("dict[str, Any]", classes), f"{key}.classes", read)
        if isinstance(classes, dict)
        else None
    )
    return TaskTable(
        data=replace(data, is_data=True) if data else None,
        classes=tuple(dict.fromkeys(name for _, name in mapping))
        if mapping is not None
        else read.texts(table["classes"], f"{key}.classes")
        if "classes" in table
        else None,
        templates=read.texts(table["templates"], f"{key}.templates") if "templates" in table else None,
        mapping=mapping,
        **{name: read.text(table[name], f"{key}.{name}") for name in texts if name in table},
    )


def _mapping(value: dict[str, Any], key: str, read: TableReader) -> tuple[tuple[str, str], ...]:
    """`{ "name in the data" = "name in the prompts" }`."""
    if not value:
        read.expected(key, "a list of names, or a table of the data's names and the prompts'", value)
    return tuple((name, read.text(other, f"{key}.{name}")) for name, other in value.items())


def recipe_text(recipe: Recipe, method: str | None = None, settings: Mapping[str, Any] | None = None) -> str:
    """The recipe in effect as TOML: after every change, with the defaults written out."""
    lines = ["schema = 1"]
    if recipe.base:
        lines.append(f"base = {toml_text(recipe.base.written)}")
    if recipe.leave_out:
        lines.append(f"leave_out = {toml_text(recipe.leave_out)}")
    if recipe.pool:
        lines.append(f"pool = {toml_text(recipe.pool)}")
    lines += [f"seed = {recipe.seed}", f"dtype = {toml_text(recipe.dtype)}"]
    lines += [f"space = {toml_text(recipe.space)}"] if recipe.space else []
    lines += ["as_adapter = true"] if recipe.as_adapter else []
    lines += [f"rank = {recipe.rank}"] if recipe.rank is not None else []
    lines += ["", "[tuned]"]
    lines += [
        f"{name if '.' not in name and '+' not in name else toml_text(name)} = {toml_text(source.written)}"
        for name, source in recipe.tuned.items()
    ]
    if method is not None:
        lines += ["", "[method]", f"name = {toml_text(method)}"]
        own = {key: value for key, value in (settings or {}).items() if key != "layers"}
        lines += [f"{key} = {toml_text(value)}" for key, value in own.items()]
        for table in (settings or {}).get("layers", ()):
            lines += [
                "",
                "[[method.layers]]",
                *(f"{key} = {toml_text(value)}" for key, value in table.items()),
            ]
    return "\n".join(lines) + "\n"
