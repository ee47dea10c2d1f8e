"""`recommend`: the methods to try first with the models and images of a recipe, and what they cost."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from mergecli import methods
from mergecli.data.tasks import find
from mergecli.formats.lora_config import CONFIG
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError, MergecliError, UsageError, toml_text
from mergecli.storage.store import locate

Images = Literal["none", "unlabeled"]
Output = Literal["tower", "routed", "told"]

IMAGES: tuple[Images, ...] = get_args(Images)
PATH = Path(__file__).with_name("recommended.toml")
LARGER = {
    "tower": "one tower",
    "routed": "a larger file, which routes",
    "told": "a larger file, which is told the task",
}


@dataclass(frozen=True)
class Suggestion:
    """A method to try."""

    method: str
    settings: Mapping[str, Any]
    why: str
    output: Output
    cost: str

    @property
    def options(self) -> str:
        """The options of `mergecli merge` that choose it."""
        changes = [f"--set 'method.{key}={toml_text(value)}'" for key, value in self.settings.items()]
        return " ".join([f"--method {self.method}", *changes])


@dataclass(frozen=True)
class Recommendation:
    """What a recipe has, and the methods to try, best first."""

    tasks: int
    adapters: int
    """How many of the models are adapters; those that are not on this machine are not counted."""
    with_images: int
    """How many tasks have images on this machine."""
    images: Images
    """What was reckoned with."""
    suggestions: tuple[Suggestion, ...]


@dataclass(frozen=True)
class _Row:
    name: str
    images: Images
    output: Output
    why: str
    settings: Mapping[str, Any]
    adapters: bool | None
    tasks: tuple[int, int]


def recommend(
    recipe: str | Path | Recipe,
    *,
    images: Images | None = None,
    may_grow: bool = False,
    changes: tuple[str, ...] = (),
    most: int = 3,
) -> Recommendation:
    """The methods to try first with a recipe's models, and images if every task has some here.

    Args:
        images: `none` or `unlabeled` in place of what is found.
        may_grow: also methods whose file is larger than one tower.
        most: how many.

    Raises:
        UsageError: the recipe is wrong, or names no models.
    """
    recipe = recipe_of(recipe, changes=changes)
    if not recipe.tuned:
        raise UsageError("there are no fine-tuned models to merge", "name them in `[tuned]` of the recipe")
    count = len(recipe.tuned)
    adapters, with_images = (
        sum(map(_is_adapter, recipe.tuned.values())),
        sum(_has_images(recipe, each) for each in recipe.tuned),
    )
    found = images or ("unlabeled" if with_images == count else "none")

    def fits(row: _Row) -> bool:
        return (
            (row.images == "none" or found == "unlabeled")
            and (may_grow or row.output == "tower")
            and (row.adapters is None or row.adapters == (adapters == count))
            and row.tasks[0] <= count <= row.tasks[1]
        )

    chosen = list(filter(fits, _rows()))
    if may_grow:  # who may have a larger file wants to see one
        chosen.sort(key=lambda row: row.output == "tower")
    suggestions: list[Suggestion] = []
    for row in chosen:
        if len(suggestions) < most and row.name not in [each.method for each in suggestions]:
            suggestions.append(Suggestion(row.name, row.settings, row.why, row.output, _cost(row)))
    return Recommendation(count, adapters, with_images, found, tuple(suggestions))


def _cost(row: _Row) -> str:
    method = methods.create(row.name, dict(row.settings))
    reads = "reads every model once" if method.reads == 1 else f"reads every model {method.reads} times"
    looks = method.looks_at if row.images == "unlabeled" else ""
    return "; ".join(part for part in (reads, method.work, looks, LARGER[row.output]) if part)


def _is_adapter(source: Any) -> bool:
    try:
        return (locate(source) / CONFIG).is_file()
    except MergecliError:
        return False


def _has_images(recipe: Recipe, name: str) -> bool:
    try:
        task = find(name, recipe)
        if task.data.kind != "toy":
            locate(task.data)
    except (UsageError, InputError):
        return False
    return True


@cache
def _rows() -> tuple[_Row, ...]:
    return tuple(_read(tomllib.loads(PATH.read_text("utf-8"))["method"]))


def _read(tables: list[dict[str, Any]]) -> Iterator[_Row]:
    for each in tables:
        least, most = each.get("tasks", (1, 1_000_000))
        yield _Row(
            each["name"], each["images"], each["output"], each["why"], each.get("settings", {}), each.get("adapters"),
            (least, most),
        )  # fmt: skip
