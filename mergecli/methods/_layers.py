"""Settings by layer: which line of a recipe's `[[method.layers]]` a tensor belongs to, and the method that merges it.

A tensor is merged as the method merges it in a whole model with the settings of its line. So what a method surveys is
the whole model still, and only what is applied to the tensor differs.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

from mergecli.methods._base import DataDriven, Group, LayerLine, Method, PerTensor, TwoPass
from mergecli.methods._calibrated import Calibrated, MayMeasure
from mergecli.methods._depth import depths, layer_of
from mergecli.methods._mixture import Mixture
from mergecli.methods._modifier import Modifier
from mergecli.methods._settings import settings_of
from mergecli.runtime.errors import nearest, toml_text

if TYPE_CHECKING:
    from torch import Tensor

_MOST = 1000
"""The most layers that a range may have; more is taken for a typing error."""
_KINDS = {
    "norm": re.compile(r".*norm.*|ln_?\w*"),
    "attention": re.compile(r".*(attn|attention).*"),
    "mlp": re.compile(r".*(mlp|ffn|feed_?forward).*|(c_)?fc\d*|intermediate|output|linear\d"),
    "embedding": re.compile(r".*embed.*|conv1"),
}
"""Kind -> what a part of a tensor's name is called; a tensor is of the first kind that one of its parts is of."""
_WORDS = re.compile(rf"(\{{[\d,\s-]+\}})?((?<=\}})\.|^|$)({'|'.join(_KINDS)})?")
"""A kind, a range of layers, or a kind within one."""
_TOKENS = re.compile(r"\{([^{}]*)\}|\[!?[^\]]+\]|.", re.DOTALL)


class Place(NamedTuple):
    """Where a tensor stands among the lines."""

    line: int | None
    """The number of its line; None where no line matches."""
    depth: float = 0.0
    """From 0, the first layer, to 1, the last; 0 where no setting of the line has a gradient."""


class UnmatchedError(ValueError):
    """A line, by its number, that no tensor belongs to."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


@dataclass(frozen=True)
class Kept(PerTensor):
    """The weights of one model as they are."""

    source: str = "base"
    """`base` or a task."""

    def merge(self, group: Group, /) -> Tensor:
        return group.base if self.source == "base" else group.tuned[group.names.index(self.source)]


def why_alike(method: type[Method]) -> str:
    """Why all layers of a method have the same settings, as what it does; empty where they may differ."""
    if issubclass(method, Mixture):
        return "writes more than one tower"
    return "goes on from one merge to the next" if method.kind == "continual" else ""


@functools.cache
def may_differ(method: type[Method]) -> frozenset[str]:
    """The settings that may differ by layer: of methods that look at images only those that the merge alone reads."""
    if why_alike(method):
        return frozenset()
    every = frozenset(settings_of(method))
    if issubclass(method, MayMeasure):
        every -= method.about_images
    return every & method.merge_time if issubclass(method, DataDriven) else every


def about_layers(method: type[Method]) -> str:
    """What of a method may differ by layer, in a sentence for people."""
    if why := why_alike(method):
        return f"nothing differs by layer: it {why}"
    free = [f"`{name}`" for name in settings_of(method) if name in may_differ(method)]
    surveys = issubclass(method, TwoPass) or (
        issubclass(method, Calibrated) and method.survey_with is not Calibrated.survey_with
    )
    again = Method.merge_time if issubclass(method, Calibrated) else method.merge_time
    again = [f"`{name}`" for name in settings_of(method) if name in may_differ(method) - again]
    what = ", ".join(free) if len(free) < len(settings_of(method)) else "every setting"
    text = f"{what} may differ by layer" if free else "no setting differs by layer, but `keep` copies layers"
    if free and surveys:
        text += "; the whole model is surveyed all the same, and what is applied to a layer differs"
        if again and not issubclass(method, Modifier):
            text += f". Each other value of {', '.join(again)} surveys the models once more"
    return text


def places(lines: Sequence[LayerLine], names: Sequence[str]) -> dict[str, Place]:
    """Name of a tensor -> its place, for the tensors that are merged.

    Raises:
        UnmatchedError: a pattern matches none of them, or lines before it match the same.
    """
    depth = depths(names)
    found: dict[str, Place] = {}
    for number, line in enumerate(lines):
        matched: set[str] = set()
        for pattern in line.match:
            fits = matcher(pattern)
            own = [name for name in names if fits(name)]
            if not own:
                near = nearest(pattern, (*_KINDS, *names))
                meant = f" (did you mean `{near}`?)" if near else f"; there is `{names[len(names) // 2]}`"
                raise UnmatchedError(number, f"no tensor that is merged matches `{pattern}`{meant}")
            matched.update(own)
        new = [name for name in names if name in matched and name not in found]
        if not new:
            raise UnmatchedError(number, "the lines before it match every tensor that it matches")
        has_gradient = line.first != line.last
        found |= {name: Place(number, depth[name] if has_gradient else 0.0) for name in new}
    return {name: found.get(name, Place(None)) for name in names}


def by_tensor(method: Method, places: Mapping[str, Place]) -> dict[str, Method]:
    """Name of a tensor -> the method that merges it; the same object where the settings are the same."""
    made: dict[Place, Method] = {}
    for place in places.values():
        if place not in made:
            made[place] = _variant(method, place)
    return {name: made[place] for name, place in places.items()}


def _variant(method: Method, place: Place) -> Method:
    line = None if place.line is None else method.layers[place.line]
    if line is not None and line.keep is not None:
        return Kept(line.keep)
    if line is None or not line.settings:
        return method
    return _between(line.first, line.last, place.depth)


def _between(first: Any, last: Any, depth: float) -> Any:
    """The value at a depth: that of the first layer at 0, that of the last at 1; whole numbers are rounded."""
    if first == last:
        return first
    if isinstance(first, Method):
        fields = [each.name for each in dataclasses.fields(first)]
        changed = {each: _between(getattr(first, each), getattr(last, each), depth) for each in fields}
        return dataclasses.replace(first, **changed)
    if isinstance(first, Mapping):
        return {key: _between(value, last[key], depth) for key, value in first.items()}
    if isinstance(first, tuple):
        return tuple(_between(*pair, depth) for pair in zip(first, last, strict=True))
    value = first * (1 - depth) + last * depth
    return round(value) if isinstance(first, int) and isinstance(last, int) else value


def end_of(value: Any, which: str) -> Any:
    """The value of a line's setting at the `first` or the `last` layer."""
    if _is_gradient(value):
        return value[which]
    if isinstance(value, Mapping):
        return {key: end_of(each, which) for key, each in value.items()}
    return [end_of(each, which) for each in value] if isinstance(value, list | tuple) else value


def gradient_problem(value: Any) -> str:
    """What is wrong with the gradients in the value of a line's setting; empty if nothing is."""
    if _is_gradient(value):
        ends = value.values()
        if all(isinstance(each, int | float) and not isinstance(each, bool) for each in ends):
            return ""
        return f"a gradient goes from one number to another, got {toml_text(value)}"
    inner: Iterable[Any] = value.values() if isinstance(value, Mapping) else ()
    inner = value if isinstance(value, list | tuple) else inner
    return next(filter(None, map(gradient_problem, inner)), "")


def _is_gradient(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and set(cast("Mapping[str, Any]", value)) == {"first", "last"}


@functools.cache
def matcher(pattern: str) -> Callable[[str], bool]:
    """What says whether a tensor's name matches a pattern.

    A pattern is a kind (`attention`, `mlp`, `norm`, `embedding`), a range of layers `{0-3}`, a kind within one `{0-3}.mlp`, or a glob
    that matches the name of the tensor or of a module around it, with or without `vision_model.` before it. In a glob `*`
    stands for anything, `?` for a character, `{0-3,7}` for numbers and `{fc1,fc2}` for words; `{8-}` is 8 and above.

    Raises:
        ValueError: it is none.
    """
    if not pattern:
        raise ValueError("is empty")
    if words := _WORDS.fullmatch(pattern):
        layers = None if words[1] is None else re.compile(_regex(words[1]))
        kind = words[3]
        return lambda name: (
            (layers is None or bool(layers.fullmatch(str(layer_of(name)))))
            and (kind is None or kind_of(name) == kind)
        )
    glob = re.compile(rf"(?:{_regex(pattern)})(?:\..*)?", re.DOTALL)
    return lambda name: bool(glob.fullmatch(name) or glob.fullmatch(name.removeprefix("vision_model.")))


def kind_of(name: str) -> str | None:
    """The kind of layer that a tensor belongs to: `norm`, `attention`, `mlp`, `embedding`, or none of them."""
    parts = name.lower().split(".")
    return next((kind for kind, word in _KINDS.items() if any(map(word.fullmatch, parts))), None)


def _regex(glob: str) -> str:
    """The regular expression of a glob."""
    found: list[str] = []
    for token in _TOKENS.finditer(glob):
        text, inner = token[0], token[1]
        if inner is not None:
            found.append(f"(?:{'|'.join(_alternative(each.strip()) for each in inner.split(','))})")
        elif text in "{}":
            raise ValueError("has an unpaired brace; ranges of layers are `{0-3}`")
        elif text[0] == "[" and len(text) > 1:
            found.append(text.replace("\\", r"\\").replace("[!", "[^", 1))
        else:
            found.append({"*": ".*", "?": "."}.get(text) or re.escape(text))
    return "".join(found)


def _alternative(text: str) -> str:
    """The regular expression of a number, a range or a word between braces."""
    if not text:
        raise ValueError("has a brace with nothing in it; ranges of layers are `{0-3}`")
    span = re.fullmatch(r"(\d+)(?:\s*(-)\s*(\d*))?", text)
    if not span:
        return re.escape(text)
    first = int(span[1])
    last = int(span[3]) if span[3] else _MOST if span[2] else first
    if last < first:
        raise ValueError(f"the range {text} ends before it begins")
    if last - first > _MOST:
        raise ValueError(f"the range {text} has more than {_MOST:,} layers")
    return rf"(?<!\d)(?:{'|'.join(map(str, range(first, last + 1)))})(?!\d)"
