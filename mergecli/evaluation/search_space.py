"""The space of a search: settings with ranges or values, and which of them a method has."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any

from mergecli import methods
from mergecli.merging.sweep_points import split_values
from mergecli.recipe.schema import Recipe
from mergecli.recipe.toml import Override, parse_value
from mergecli.runtime.errors import UsageError, did_you_mean, quoted, toml_text

DIGITS = 4
"""Significant digits of a proposed number: more say nothing of a merge, and nobody can read them."""
_SHAPE = "`method.SETTING=LOW:HIGH`, `LOW:HIGH:log`, `LOW:HIGH:STEP` or `VALUE,VALUE,...`"


@dataclass(frozen=True)
class Dimension:
    """One setting and where it is searched: a range, or values to choose from."""

    key: str
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    """Whether numbers are drawn evenly over their logarithm."""
    whole: bool = False
    """Whether only whole numbers are drawn."""
    values: tuple[Any, ...] = ()
    """What is chosen from; empty for a range."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The values as text, each another."""
        return tuple(each if isinstance(each, str) else toml_text(each) for each in self.values)

    @property
    def text(self) -> str:
        """The dimension as it is written."""
        if self.values:
            return f"{self.key}={','.join(map(toml_text, self.values))}"
        more = ":log" if self.log else "" if self.step is None else f":{self.step:g}"
        return f"{self.key}={self.low:g}:{self.high:g}{more}"

    def at(self, share: float) -> Any:
        """The value at a share of the range, from 0 to 1; each of several values has an equal part of it."""
        share = min(max(share, 0.0), 1.0)
        if self.values:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.log:
            return self.near(
                math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
            )
        if self.step is not None:
            count = round((self.high - self.low) / self.step) + 1
            return self.near(self.low + min(int(share * count), count - 1) * self.step)
        return self.near(self.low + share * (self.high - self.low))

    def share(self, value: Any) -> float:
        """Where in the range a value lies; the inverse of `at`."""
        if self.values:
            return (self.values.index(value) + 0.5) / len(self.values)
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def near(self, value: float) -> Any:
        """The value that a number of the range stands for: whole, on a step, or with a few digits."""
        if self.step is not None:
            value = float(
                Decimal(str(self.low)) + round((value - self.low) / self.step) * Decimal(str(self.step))
            )
        if self.whole:
            return min(max(round(value), int(self.low)), int(self.high))
        return min(max(float(f"{value:.{DIGITS}g}") if self.step is None else value, self.low), self.high)

    def levels(self, count: int) -> list[Any]:
        """The values of a grid: all values, all steps, or so many in equal distances."""
        if self.values:
            return list(self.values)
        if self.step is not None:
            return [
                self.near(self.low + n * self.step)
                for n in range(round((self.high - self.low) / self.step) + 1)
            ]
        shares = [n / (count - 1) for n in range(count)] if count > 1 else [0.5]
        return list(dict.fromkeys(self.at(share) for share in shares))


def parse_dimension(text: str) -> Dimension:
    """`KEY=LOW:HIGH`, with `:log` or `:STEP` behind it, or `KEY=VALUE,VALUE,...`.

    Raises:
        UsageError: it is neither.
    """
    key, equals, written = (part.strip() for part in text.partition("="))
    if not equals or not written or not (key.startswith("method.") and len(key) > len("method.")):
        is_setting = equals and written and key and "." not in key
        meant = f" (did you mean `method.{text}`?)" if is_setting else ""
        raise UsageError(f"--space `{text}`: expected {_SHAPE}{meant}")
    if re.fullmatch(r"[-+]?[.\d][^:,\[{]*(:[^:,]*){1,2}", written):
        return _range(key, written, text)
    try:
        values = tuple(map(parse_value, split_values(written)))
    except ValueError as error:
        raise UsageError(f"--space `{text}`: {error}") from error
    if len(values) < 2:
        raise UsageError(f"--space `{text}`: one value is nothing to search; `--set {key}={written}` sets it")
    if len(set(map(repr, values))) != len(values):
        raise UsageError(f"--space `{text}`: a value stands there twice")
    return Dimension(key, values=values)


def _range(key: str, written: str, text: str) -> Dimension:
    first, second, *rest = (part.strip() for part in written.split(":"))
    log = rest == ["log"]
    try:
        low, high = Decimal(first), Decimal(second)
        step = Decimal(rest[0]) if rest and not log else None
        finite = low.is_finite() and high.is_finite() and (step is None or step.is_finite())
    except InvalidOperation as error:
        raise UsageError(f"--space `{text}`: expected {_SHAPE}") from error
    if not finite or high <= low:
        raise UsageError(f"--space `{text}`: expected a range from a lower to a higher number")
    if log and low <= 0:
        raise UsageError(f"--space `{text}`: a range with `log` begins above 0")
    if step is not None:
        if not 0 < step <= high - low:
            raise UsageError(f"--space `{text}`: expected a step above 0 and at most {high - low}")
        high = low + (high - low) // step * step
    whole = (
        all(each is None or each == each.to_integral_value() for each in (low, high, step))
        and "." not in written
    )
    return Dimension(key, float(low), float(high), None if step is None else float(step), log, whole)


@dataclass(frozen=True)
class Space:
    """What is searched, of a recipe's method."""

    dimensions: tuple[Dimension, ...]
    recipe: Recipe

    @classmethod
    def of(cls, written: Sequence[str], recipe: Recipe) -> Space:
        """Raises UsageError if a dimension is wrong, or is a setting of none of the methods."""
        if not written:
            raise UsageError("there is nothing to search", "`--space method.scaling_factor=0.05:1.0`")
        found = [parse_dimension(each) for each in written]
        keys = [each.key for each in found]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise UsageError(f"--space: `{twice[0]}` stands there twice")
        # what says which method it is comes first: the others may be settings of that
        found.sort(key=lambda each: (each.key != "method.name", not each.key.endswith((".name", ".of"))))
        space = cls(tuple(found), recipe)
        names = next((each.values for each in found if each.key == "method.name"), (recipe.method,))
        if names == (None,):
            raise UsageError(
                "no method is named",
                "name one in `[method]`, with `--method`, or with `--space method.name=...`",
            )
        for name in names:
            if name not in methods.names():
                near = did_you_mean(str(name), methods.names())
                raise UsageError(
                    f"--space method.name: unknown method `{name}`{near}", "`mergecli methods` lists them"
                )
        typed: list[Dimension] = []
        for each in found:
            kinds = [kind for name in names for kind in space._places(each, str(name))]
            if not kinds:
                raise UsageError(f"--space {each.key}: is a setting of none of {quoted(map(str, names))}")
            whole = each.whole and all(kind is None or "a whole number" in kind.expected for kind in kinds)
            typed.append(Dimension(each.key, each.low, each.high, each.step, each.log, whole, each.values))
        return cls(tuple(typed), recipe)

    def _places(self, dimension: Dimension, name: str) -> list[methods.Setting | None]:
        """What the dimension sets of the method of this name, with any of the values that say which others it changes."""
        inner = [each for each in self.dimensions if each.key.endswith((".of", ".of.name"))]
        chosen: list[dict[str, Any]] = [{}]
        for each in inner:
            chosen = [{**one, each.key: value} for one in chosen for value in each.values]
        found = [self.place(dimension.key, {**one, "method.name": name}) for one in chosen]
        return [each[1] for each in found if each is not None]

    def place(self, key: str, chosen: Mapping[str, Any]) -> tuple[str, methods.Setting | None] | None:
        """The key of what a dimension sets, and the setting where there is one; None if the method has none such."""
        name = str(chosen.get("method.name", self.recipe.method))
        own = self.recipe.settings if name == self.recipe.method else {}
        if key == "method.name":
            return key, None
        line = re.match(r"layers\[\d+\]\.", rest := key.removeprefix("method."))
        prefix = f"method.{line[0]}" if line else "method."
        rest = rest[len(line[0]) :] if line else rest
        if line and rest in ("keep", "match"):
            return key, None
        found = _within(
            name, own, rest, "", {each.removeprefix("method."): value for each, value in chosen.items()}
        )
        return None if found is None else (prefix + found[0], found[1])

    def values(self, suggest: Callable[[Dimension], Any]) -> dict[str, Any]:
        """Key -> value, of those dimensions that the chosen method has."""
        found: dict[str, Any] = {}
        for each in self.dimensions:
            if self.place(each.key, found) is not None:
                found[each.key] = suggest(each)
        return found

    def overrides(self, values: Mapping[str, Any]) -> list[Override]:
        """The changes to the recipe that these values are."""
        found: list[Override] = []
        name = values.get("method.name", self.recipe.method)
        own = dict(self.recipe.settings) if name == self.recipe.method else {}
        if name != self.recipe.method:
            found.append(Override("method", {"name": name}, "--space"))
        places = [(place[0], value) for key, value in values.items() if (place := self.place(key, values))]
        inner = [key for key, _ in places if key.startswith("method.of.")]
        if inner and "of" not in own and "method.of" not in values and "method.of.name" not in values:
            of = methods.settings(str(name))["of"].default  # a table that is changed is there
            found.append(
                Override("method.of", {"name": methods.name_of(of), **methods.table_of(of)}, "--space")
            )
        found += [Override(key, value, "--space") for key, value in places if key != "method.name"]
        return found

    def ends(self) -> list[dict[str, Any]]:
        """Values among which all that could be refused are: the ends of the ranges, and each value to choose."""
        names = next((each.values for each in self.dimensions if each.key == "method.name"), (None,))
        most = max(len(each.values) or 2 for each in self.dimensions)

        def pick(dimension: Dimension, name: object, number: int) -> Any:
            if dimension.key == "method.name":
                return name
            values = dimension.values or (dimension.at(0), dimension.at(1))
            return values[number % len(values)]

        return [
            self.values(partial(pick, name=name, number=number)) for name in names for number in range(most)
        ]


def _within(
    name: str, own: Mapping[str, Any], path: str, before: str, chosen: Mapping[str, Any]
) -> tuple[str, methods.Setting | None] | None:
    """The path of a setting of a method; a modifier has those of the method that it changes too."""
    if name not in methods.names():
        return None
    known = methods.settings(name)
    first, _, rest = path.partition(".")
    first = first.partition("[")[0]
    setting = known.get(first)
    if setting is not None and not (rest and setting.is_method and rest != "name"):
        return before + path, setting
    inner = "of" if setting is None else first
    if inner not in known or not known[inner].is_method:
        return None
    of = chosen.get(
        f"{before}{inner}", chosen.get(f"{before}{inner}.name", own.get(inner, known[inner].default))
    )
    table = {"name": methods.name_of(of), **methods.table_of(of)} if isinstance(of, methods.Method) else of
    table = {"name": table} if isinstance(table, str) else dict(table or {})
    return _within(
        str(table.get("name")), table, path if setting is None else rest, f"{before}{inner}.", chosen
    )


def grid(space: Space, trials: int) -> list[dict[str, Any]]:
    """The points of the largest grid of at most so many trials whose ranges have about equally many values.

    Raises:
        UsageError: the values and steps alone are more.
    """
    ranges = [each for each in space.dimensions if not each.values and each.step is None]
    counts = {each.key: 1 for each in ranges}

    def points() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{}]
        for each in space.dimensions:
            found = [
                {**one, each.key: value} if space.place(each.key, one) is not None else one
                for one in found
                for value in (
                    each.levels(counts.get(each.key, 0)) if space.place(each.key, one) is not None else [None]
                )
            ]
        return found

    best = points()
    if len(best) > trials:
        raise UsageError(f"--trials: the grid has {len(best):,} points, got {trials:,}")
    grows = True
    while grows:
        grows = False
        for each in sorted(ranges, key=lambda each: counts[each.key]):
            counts[each.key] += 1
            more = points()
            if len(best) < len(more) <= trials:
                best, grows = more, True
                break
            counts[each.key] -= 1
    return best
