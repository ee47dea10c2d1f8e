"""Class names of the data and class names of the prompts: which belongs to which."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from mergecli.runtime.errors import InputError, MergecliWarning, quoted

if TYPE_CHECKING:
    from mergecli.data.tasks import Task

_WIDTH = 32
_ROWS = 12
"""Lines of a message that shows two lists side by side."""


@dataclass(frozen=True)
class MatchedNames:
    """The class names that images are scored under, and which of them each label of the data means."""

    names: tuple[str, ...]
    labels: Mapping[int, int] | None
    """Label in the data -> number of the name; None where they are the same."""
    how: str
    """`by name`, `by position`, ...: for people."""


def normalized(name: str) -> str:
    """The name without case, spaces, `_` and `-`, in one Unicode form; two names that are equal so are one name."""
    plain = re.sub(r"[\s_\-]+", "", _caseless(name))
    return str(int(plain)) if is_number(plain) else plain


def is_number(name: str) -> bool:
    """Whether the name is a whole number."""
    return name.isascii() and name.isdigit() and len(name) < 19


def sorted_names(names: Sequence[str] | set[str]) -> list[str]:
    """The names in order; where all are whole numbers, by their number."""
    if all(map(is_number, names)):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def match_names(own: Sequence[str] | None, used: Sequence[int], task: Task, where: str) -> MatchedNames:
    """The names that the task's images are scored under.

    Args:
        own: the names in the data, in the order of its labels; None where the data have numbers only.
        used: the labels that occur.

    Raises:
        InputError: names of the data and of the task do not fit.
    """
    table = f"[tasks.{task.name}]"
    if task.mapping is not None:
        return _mapped(own if own is not None else {each: str(each) for each in used}, task, where)
    if task.classes is None:
        if own is None:
            raise InputError(f"{where}: has no class names of its own", f"give `classes` under `{table}`")
        _warn_of_twins(own, where)
        return MatchedNames(tuple(own), None, "the data's own names")
    if own is None:
        return MatchedNames(task.classes, None, "labels are numbers")
    if task.match == "position":
        if len(own) != len(task.classes):
            raise _unmatched(own, task, {}, where)
        return MatchedNames(task.classes, None, "by position")
    return _by_name(own, task, where)


def _mapped(own: Sequence[str] | Mapping[int, str], task: Task, where: str) -> MatchedNames:
    """`classes = { "the data's name" = "the prompt's name" }`; several names of the data may be one class."""
    given = dict(task.mapping or ())
    names = tuple(dict.fromkeys(given.values()))
    loose = {normalized(key): value for key, value in given.items()}
    every = own if isinstance(own, Mapping) else dict(enumerate(own))
    found = {label: given.get(name, loose.get(normalized(name))) for label, name in every.items()}
    if missing := [every[label] for label, name in found.items() if name is None]:
        raise InputError(
            f"{where}: `classes` under `[tasks.{task.name}]` does not say what {quoted(missing)} of the data is",
            'each name in the data needs the prompt\'s name: `classes = { "n01440764" = "tench" }`',
        )
    labels = {label: names.index(name) for label, name in found.items() if name is not None}
    return MatchedNames(names, labels, "as the recipe maps them")


def _by_name(own: Sequence[str], task: Task, where: str) -> MatchedNames:
    names = task.classes or ()
    place = {name: number for number, name in enumerate(names)}
    labels = {label: place[name] for label, name in enumerate(own) if name in place}
    loose: dict[str, list[int]] = defaultdict(list)
    for name, number in place.items():
        loose[normalized(name)].append(number)
    of_data: dict[str, list[int]] = defaultdict(list)
    for label, name in enumerate(own):
        of_data[normalized(name)].append(label)
    for plain, same in of_data.items():
        if len(same) == 1 and len(loose[plain]) == 1:
            labels[same[0]] = loose[plain][0]
    if len(labels) == len(own) and len(set(labels.values())) == len(names):
        return MatchedNames(names, None if _is_same(labels) else labels, "by name")
    if all(map(is_number, own)) and not any(map(is_number, names)):
        numbers = [int(name) for name in own]
        first = min(numbers)
        if sorted(numbers) == list(range(first, first + len(names))) and first in (0, 1):
            by_number = {label: number - first for label, number in enumerate(numbers)}
            return MatchedNames(names, None if _is_same(by_number) else by_number, "by number")
    if task.match == "own data" and len(own) == len(names) and _is_same(labels):
        other = [
            f"`{mine}` as `{name}`"
            for n, (mine, name) in enumerate(zip(own, names, strict=True))
            if n not in labels
        ]
        warnings.warn(
            f"{where}: {len(other)} of {len(own)} class names are written otherwise than the task's, and taken by their "
            f"position: {', '.join(other[:4])}" + (f" (and {len(other) - 4} more)" if len(other) > 4 else ""),
            MergecliWarning,
            stacklevel=2,
        )
        return MatchedNames(names, None, "by position")
    raise _unmatched(own, task, labels, where)


def _is_same(labels: Mapping[int, int]) -> bool:
    return all(label == number for label, number in labels.items())


def _unmatched(own: Sequence[str], task: Task, labels: Mapping[int, int], where: str) -> InputError:
    """The error with both lists side by side, what does not match first."""
    names = task.classes or ()
    lacking = [name for number, name in enumerate(names) if number not in labels.values()]
    more = [name for label, name in enumerate(own) if label not in labels]
    rows = list(zip_longest(more, lacking, fillvalue="-"))
    rows += [(own[label], names[number]) for label, number in labels.items()]
    wide = min(_WIDTH, max(len(_cut(left)) for left, _ in [("in the data", ""), *rows]))
    lines = [
        f"  {_cut(left):{wide}}  {_cut(right)}".rstrip()
        for left, right in [("in the data", "in the task"), *rows[:_ROWS]]
    ]
    if len(rows) > _ROWS:
        lines.append(f"  (and {len(rows) - _ROWS} more)")
    twins = _twins(own, normalized)
    what = (
        f"the data have {len(own)} classes, the task has {len(names)}"
        if len(own) != len(names)
        else f"{len(more)} of {len(own)} class names of the data are not the task's"
    )
    if twins:
        what += f"; {quoted(twins[0])} differ only in case, spaces, `_` or `-`"
    key = (more or list(own))[0].replace("\\", "\\\\").replace('"', '\\"')
    return InputError(
        f"{where}: {what}\n" + "\n".join(lines),
        f'under `[tasks.{task.name}]`, `classes = {{ "{key}" = "...", ... }}` says for each name in the data the prompt\'s '
        'name; `match = "position"` takes both lists in their order',
    )


def _caseless(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _cut(name: str) -> str:
    return name if len(name) <= _WIDTH else name[: _WIDTH - 3] + "..."


def _twins(names: Sequence[str], form: Callable[[str], str]) -> list[list[str]]:
    same: dict[str, list[str]] = defaultdict(list)
    for name in names:
        same[form(name)].append(name)
    return [each for each in same.values() if len(each) > 1]


def _warn_of_twins(names: Sequence[str], where: str) -> None:
    for twins in _twins(names, _caseless):
        warnings.warn(
            f"{where}: the class names {quoted(twins)} differ only in case or Unicode form, and are counted as "
            f"{len(twins)} classes",
            MergecliWarning,
            stacklevel=2,
        )
