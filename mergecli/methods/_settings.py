"""The settings of a method: their types, ranges and documentation, checked without importing torch."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from mergecli.methods._base import Method
from mergecli.runtime.errors import nearest, toml_text


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; an end is left out where its `open_` is true."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return "" if self.low == -math.inf else f"{'above' if self.open_low else 'at least'} {self.low:g}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


MOST = 1e30
"""The largest number a setting may be: weights are float32."""

Fraction = Annotated[float, Range(0, 1, open_low=True)]
"""A share of the entries: above 0, at most 1."""


@dataclass(frozen=True)
class Setting:
    """One setting as `mergecli methods NAME` shows it."""

    name: str
    kind: Any
    default: Any
    documentation: str

    @property
    def is_method(self) -> bool:
        """Whether the value is another method: a table with `name` and its settings."""
        return self.kind is Method

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def expected(self) -> str:
        """`a number in (0, 1]`, `one of "sum", "mean"`, ..."""
        return _expected(self.kind)

    def problem(self, value: Any) -> str:
        """`expected ..., got ...`, or an empty string if the value is fine; what is in a method's table is not checked."""
        return "" if _fits(value, self.kind) else f"expected {self.expected}, got {toml_text(value)}"


@functools.cache
def settings_of(method: type) -> Mapping[str, Setting]:
    """The settings of a method class, in the order of its source."""
    hints = get_type_hints(method, include_extras=True)
    documents = _field_documents(method)
    result: dict[str, Setting] = {}
    for field in dataclasses.fields(method):
        if field.name == "layers":
            continue
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        result[field.name] = Setting(field.name, hints[field.name], default, documents.get(field.name, ""))
    return result


_OTHER_WORDS = {
    "alpha": "scaling_factor", "coefficient": "scaling_factor", "scale": "scaling_factor", "scaling_coef": "scaling_factor",
    "dropout": "drop_rate", "epsilon": "window", "k": "density", "keep": "density", "top_k": "density", "threshold": "density",
    "lr": "learning_rate", "max_steps": "steps", "iterations": "steps", "merge_func": "aggregate", "method": "of",
    "num_examples": "examples", "samples": "examples", "temp": "temperature", "weight": "weights",
}  # fmt: skip
"""What other tools call settings."""


def meant_setting(name: str, known: Mapping[str, Setting]) -> str:
    """The setting that a paper's letter or another tool's word stands for, or of nearest name; an empty string if none is."""
    letter = (each.name for each in known.values() if re.match(rf"{re.escape(name)}\b", each.documentation))
    word = _OTHER_WORDS.get(name.lower().replace("-", "_"), "")
    return next(letter, "") or (word if word in known else nearest(name, known))


def setting_problems(method: type, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(setting, what is wrong) for unknown, missing and ill-valued settings."""
    known = settings_of(method)
    problems = [
        (
            name,
            f"unknown setting{_did_you_mean(name, known)}; there are {', '.join(f'`{each}`' for each in known)}",
        )
        if known
        else (name, "unknown setting; this method has none")
        for name in values
        if name not in known
    ]
    for name, setting in known.items():
        if name in values:
            if problem := setting.problem(values[name]):
                problems.append((name, problem))
        elif setting.required:
            problems.append((name, f"is missing: expected {setting.expected}"))
    return problems


def _did_you_mean(name: str, known: Mapping[str, Setting]) -> str:
    meant = meant_setting(name, known)
    return f" (did you mean `{meant}`?)" if meant else ""


def frozen(value: Any) -> Any:
    """The value with lists made tuples, so that a frozen dataclass can hold it."""
    return tuple(frozen(each) for each in value) if isinstance(value, list) else value


def settled(value: Any, kind: Any) -> Any:
    """The value, which fits the kind, as a method holds it: lists are tuples, and numbers are floats where not only whole
    ones are allowed."""
    bare, _ = _parts(kind)
    inner = [each for each in get_args(bare) if each not in (type(None), ...)]
    if isinstance(value, list | tuple):
        return tuple(settled(each, inner[0]) for each in value)
    if get_origin(bare) in (dict, Mapping):
        return {key: settled(each, inner[1]) for key, each in value.items()}
    kinds = [_parts(each)[0] for each in inner] or [bare]
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and float in kinds and int not in kinds else value


def _parts(kind: Any) -> tuple[Any, Range | None]:
    if get_origin(kind) is Annotated:
        bare, *extras = get_args(kind)
        return bare, next((extra for extra in extras if isinstance(extra, Range)), None)
    return kind, None


def _fits(value: Any, kind: Any) -> bool:
    bare, limits = _parts(kind)
    origin = get_origin(bare)
    if bare is Method:
        named = value.get("name") if isinstance(value, Mapping) else value
        return isinstance(value, Method) or (isinstance(named, str) and bool(named))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(bare)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(each, get_args(bare)[0]) for each in value)
    if origin is dict or origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(each, get_args(bare)[1]) for each in value.values())
    if args := [each for each in get_args(bare) if each is not type(None)]:
        return any(_fits(value, each) for each in args)
    if bare is bool or isinstance(value, bool):
        return bare is bool and isinstance(value, bool)
    if bare is float:
        return isinstance(value, int | float) and abs(value) <= MOST and (limits is None or value in limits)
    if bare is int:
        return isinstance(value, int) and (limits is None or value in limits)
    return isinstance(value, bare)


def _expected(kind: Any) -> str:
    bare, limits = _parts(kind)
    origin = get_origin(bare)
    if bare is Method:
        return 'a method, such as { name = "task_arithmetic", scaling_factor = 0.3 }'
    if origin is Literal:
        return "one of " + ", ".join(f'"{each}"' for each in get_args(bare))
    if origin is tuple:
        return f"a list, each {_expected(get_args(bare)[0])}"
    if origin is dict or origin is Mapping:
        return f"a table, each value {_expected(get_args(bare)[1])}"
    if args := [each for each in get_args(bare) if each is not type(None)]:
        return " or ".join(_expected(each) for each in args)
    name = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}.get(
        bare, str(bare)
    )
    return f"{name} {limits}".rstrip() if limits else name


@functools.cache
def _field_documents(method: type) -> dict[str, str]:
    """Setting -> the string under its field, read from the source."""
    documents: dict[str, str] = {}
    for owner in reversed(method.__mro__[:-1]):
        body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                documents[field.target.id] = inspect.cleandoc(text.value.value)
    return documents
