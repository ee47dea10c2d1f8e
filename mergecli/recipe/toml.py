"""Values taken out of parsed TOML, with everything that is wrong with them, and where it stands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import tomli

from mergecli.runtime.errors import UsageError, listed
from mergecli.storage.sources import HUBS, Source, checked_inside, parse_source
from mergecli.storage.table_reader import Problem, TableReader

SOURCE_KEYS = ("source", "revision", "subfolder", "file", "dtype", "modelscope", "adapter")
SOURCE_DTYPES = ("float32", "float16", "bfloat16")

_NUMBER = re.compile(r"\[\d+\]$")
"""Of a dotted key: a number in brackets at its end."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class Override(NamedTuple):
    """A value in place of what the recipe's file says under a dotted key, and the option that gave it."""

    key: str
    value: Any
    option: str
    """`--set`, `--method`, ...: what a message about the value begins with."""


@dataclass
class RecipeReader:
    """A recipe's tables as they are read: where each value comes from, and what is wrong with it."""

    anchor: Path = Path()
    """What relative paths in the file are relative to; those of an override are relative to the current folder."""
    options: dict[str, str] = field(default_factory=dict[str, str])
    """Key -> the option that set it, and all that is below it."""
    values: TableReader = field(default_factory=TableReader)
    naming: str = ""
    """How a model gets another name, where no key of a file names it."""

    def option(self, key: str) -> str | None:
        """The option that gave the value under a dotted key; None where the file did."""
        while key and key not in self.options:
            key = _NUMBER.sub("", key) if _NUMBER.search(key) else key.rpartition(".")[0]
        return self.options.get(key)

    def override(self, table: dict[str, Any], each: Override) -> None:
        """Puts the value where its key says; tables on the way are copied, since they may be the caller's."""
        self.options[each.key] = each.option
        steps = _steps(each.key)
        holder: Any = table
        for step, after in pairwise(steps):
            inner: Any = _inside(holder, step, {} if isinstance(after, str) else [])
            if steps[0] == "method" and isinstance(inner, str):  # a method's name alone stands for its table
                inner = {"name": inner}
            elif after in SOURCE_KEYS and isinstance(inner, str):  # and so does a source
                inner = {"source": inner}
            if not isinstance(inner, Mapping if isinstance(after, str) else list):
                what = "a table" if isinstance(after, str) else "a list"
                self.values.wrong(each.key, f"`{step}` is not {what}")
                return
            if isinstance(after, int) and after > len(inner):
                there = f"there are {len(inner)} of them" if inner else "there is none"
                self.values.wrong(each.key, f"`{step}[{after}]`: {there}; `[{len(inner)}]` adds one")
                return
            _put(
                holder,
                step,
                dict(cast("Mapping[str, Any]", inner)) if isinstance(inner, Mapping) else list(inner),
            )
            holder = holder[step]
        _put(holder, steps[-1], each.value)

    def refuse(self, where: str, text: str = "") -> None:
        """Raises UsageError with every problem, each with its option, or else with `where` and the line of the TOML `text`."""
        problems = self.values.problems
        if not problems:
            return
        ordered = sorted(dict.fromkeys(problems), key=lambda each: line_of(text, each.key) or 0)
        lines = [self._line(each, where, text) for each in ordered]
        hint = "; ".join(list(dict.fromkeys(each.hint for each in ordered if each.hint))[:2])
        if len(lines) == 1:
            raise UsageError(lines[0], hint)
        raise UsageError(f"the recipe has {len(lines)} problems:\n{listed(lines, 20)}", hint)

    def _line(self, problem: Problem, where: str, text: str) -> str:
        place = self.option(problem.key)
        if place == "--method" and problem.key == "method.name":
            return f"{place}: {problem.what}"
        if place is None and not line_of(
            text, problem.key
        ):  # a table that is there only for what options put into it
            place = next(
                (each for key, each in self.options.items() if key.startswith(f"{problem.key}.")), None
            )
        return f"{place or place_of(where, text, problem.key)}: {problem}"

    def source(self, value: object, key: str) -> Source | None:
        """A source, written as a string or as a table that says more."""
        if isinstance(value, dict):
            return self._source_table(cast("dict[str, Any]", value), key)
        if text := self.values.text(value, key):
            anchor = Path() if self.option(key) else self.anchor
            try:
                return parse_source(text, anchor)
            except UsageError as error:
                self.values.wrong(key, error.message, error.hint)
        return None

    def _source_table(self, value: dict[str, Any], key: str) -> Source | None:
        read = self.values
        table = read.table(value, key, SOURCE_KEYS)
        if "source" not in table:
            read.wrong(f"{key}.source", "is missing: expected a source such as `hf:org/name`, or a path")
            return None
        text = read.text(table["source"], f"{key}.source")
        found = self.source(text, f"{key}.source") if text else None
        if found is None:
            return None
        given = {name: read.text(table[name], f"{key}.{name}") for name in SOURCE_KEYS[1:-1] if name in table}
        if (revision := given.get("revision")) is not None and (found.revision or found.kind not in HUBS):
            read.wrong(
                f"{key}.revision",
                "the source has one already" if found.revision else "only a hub's source has one",
            )
        dtype = given.get("dtype")
        if dtype:
            read.one_of(dtype, f"{key}.dtype", SOURCE_DTYPES)
        other = given.get("modelscope")
        if other and (found.kind != "hf" or other.count("/") != 1):
            read.expected(f"{key}.modelscope", "`org/name` beside an `hf:` source", other)
        inside = "/".join(part for part in (found.inside, given.get("subfolder"), given.get("file")) if part)
        try:
            inside = checked_inside(inside) if inside else ""
        except UsageError as error:
            read.wrong(f"{key}.{'file' if 'file' in given else 'subfolder'}", error.message)
        adapter = self.source(table["adapter"], f"{key}.adapter") if "adapter" in table else None
        return replace(
            found,
            revision=found.revision or revision,
            inside=inside or None,
            dtype=dtype,
            modelscope=other,
            adapter=adapter,
        )

    def name(self, name: str, key: str) -> str:
        """The name of a task or a model, which files and results are called by."""
        if name == "base" and key.startswith("tuned."):
            self.values.wrong(key, "`base` is the name of the base: give this model another")
        if name in ("model", "method", "average", "reference", "difference") and key.startswith("tasks."):
            self.values.wrong(key, "a column of every report has this name: give the task another")
        if name == "_pretrained_":
            self.values.wrong(
                key, "the pre-trained model is called `base` here, and stands at the top of the recipe"
            )
        elif not _NAME.fullmatch(name):
            why = "names that begin with an underscore are reserved" if name.startswith("_") else "bad name"
            self.values.wrong(
                key,
                f"{why}: expected letters, digits, `-`, `_`, `.` or `+`, beginning with a letter or digit",
                self.naming,
            )
        return name


def _steps(key: str) -> list[str | int]:
    """`a.b[0].c` as `a`, `b`, 0, `c`; a model's or a task's name may have dots and brackets in it."""
    first = key.partition(".")[0]
    name, _, last = key.rpartition(".")
    if first == "tuned" and last in SOURCE_KEYS and name != first:
        return [*_steps(name), last]
    steps: list[str | int] = []
    for part in key.split(".", {"tuned": 1, "tasks": 2}.get(first, -1)):
        found = re.fullmatch(r"\s*([^\[\]]*?)\s*((?:\[\d+\])*)\s*", part) if first == "method" else None
        steps.append(found[1] if found else part.strip())
        steps += [int(number) for number in re.findall(r"\d+", found[2])] if found else []
    return steps


def _inside(holder: Any, step: str | int, missing: Any) -> Any:
    """The value under a name or a number."""
    if isinstance(step, int):
        return holder[step] if step < len(holder) else missing
    return holder.get(step, missing)


def _put(holder: Any, step: str | int, value: Any) -> None:
    """Sets the value under a name or a number; the number after the last one adds it."""
    if isinstance(step, int) and step == len(holder):
        holder.append(value)
    else:
        holder[step] = value


def parse_changes(changes: Iterable[str]) -> list[Override]:
    """The `key.sub=value` changes of `--set`.

    Raises:
        UsageError: one has no key, or its value is neither TOML nor a bare word.
    """
    found: list[Override] = []
    for change in changes:
        key, equals, written = (part.strip() for part in change.partition("="))
        if not equals or not key:
            raise UsageError(f"--set: `{change}`: expected `KEY=VALUE`, such as `method.scaling_factor=0.3`")
        try:
            found.append(Override(key, parse_value(written), "--set"))
        except ValueError as error:
            raise UsageError(f"--set: `{key}`: {error}") from error
    return found


def parse_value(written: str) -> Any:
    """The TOML value, or the bare word as a string.

    Raises:
        ValueError: it is neither.
    """
    try:
        values = tomli.loads(f"value = {written}")
    except (ValueError, RecursionError):
        if not written or written[0] in "\"'[{":
            got = f"`{written}`" if written else "nothing"
            raise ValueError(f"expected a TOML value, got {got}") from None
        return written
    if set(values) != {"value"}:  # there are lines after it
        raise ValueError("expected one TOML value")
    return values["value"]


def place_of(where: str, text: str, key: str) -> str:
    """`FILE:LINE` of a dotted key; without the line if the key is not in the text."""
    line = line_of(text, key)
    return f"{where}:{line}" if line else where


def line_of(text: str, key: str) -> int | None:
    """The line on which a dotted key, or else the nearest table around it, begins; None if it is not in the text."""
    table, found, nearest = "", None, 0
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        code = line.strip()
        if code.startswith("["):
            table = code.strip("[] ").split("]")[0].replace('"', "").replace(" ", "")
            if code.startswith("[["):
                counts[table] = counts.get(table, -1) + 1
                table = f"{table}[{counts[table]}]"
            dotted = table
        elif "=" in code and not code.startswith("#"):
            name = code.split("=", 1)[0].strip().replace('"', "").replace(" ", "")
            dotted = f"{table}.{name}" if table else name
        else:
            continue
        if dotted == key:
            return number
        if len(dotted) > nearest and key.startswith(dotted + "."):
            found, nearest = number, len(dotted)
    return found
