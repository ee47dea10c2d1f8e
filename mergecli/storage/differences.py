"""Tensors in a file compared with those that should be there: names, shapes and dtypes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mergecli.runtime.errors import quoted, toml_text
from mergecli.storage.checkpoint import PROJECTION, VISION, Checkpoint, TensorEntry
from mergecli.storage.safetensors_format import FLOATS


class Form(NamedTuple):
    """What a tensor should be."""

    shape: tuple[int, ...]
    dtype: str | None = None
    """A safetensors dtype; None stands for any."""
    any_float: bool = False
    """Whether every floating point dtype will do, and `dtype` is only what messages call it."""

    def accepts(self, dtype: str) -> bool:
        """Whether the tensor may have that dtype."""
        if self.any_float:
            return dtype in FLOATS
        return self.dtype in (None, dtype)


def differences(
    have: Mapping[str, TensorEntry], want: Mapping[str, Form], whose: str = "expected"
) -> list[str]:
    """A line for every tensor that is missing, extra, of another shape or of another dtype; empty if all is well.

    Args:
        whose: what messages put before the wanted shape or dtype, such as `the base has`.
    """
    lines = [f"lacks tensor `{name}`" for name in want if name not in have]
    lines += [f"has an extra tensor `{name}`" for name in have if name not in want]
    for name, form in want.items():
        if (entry := have.get(name)) is None:
            continue
        if entry.shape != form.shape:
            lines.append(f"`{name}` has shape {entry.shape}, {whose} {form.shape}")
        elif not form.accepts(entry.dtype):
            lines.append(f"`{name}` has dtype {entry.dtype}, {whose} {form.dtype}")
    return lines


def other_architecture(
    have: Mapping[str, TensorEntry], want: Mapping[str, Form], whose: str = "expected"
) -> str:
    """`width 64, 2 layers; the base has width 128, 4 layers`: what differs between two towers; empty if nothing does. Of
    models without a common name, some of their names."""
    if have and want and not (have.keys() & want.keys()) - {PROJECTION}:
        names = [quoted(sorted(each.keys() - {PROJECTION}), 2) for each in (have, want)]
        return f"none of the same tensors, but {names[0]}; {whose} {names[1]}"
    mine, theirs = _architecture(have), _architecture(want)
    for facts in _FACTS:
        known = [fact for fact in facts if fact in mine and fact in theirs]
        if any(mine[fact] != theirs[fact] for fact in known):
            told = [", ".join(fact.format(each[fact]) for fact in known) for each in (mine, theirs)]
            return f"{told[0]}; {whose} {told[1]}"
    return ""


_FACTS = (("width {}", "{} layers"), ("patches of {} pixels",), ("{} positions",), ("MLPs of {}",))
"""What a vision transformer is told by; the first that differs says enough."""


def _architecture(tensors: Mapping[str, TensorEntry | Form]) -> dict[str, int]:
    """Fact -> number, as far as a vision transformer's tensors say."""
    shapes = {name.removeprefix(VISION): each.shape for name, each in tensors.items()}
    sides = {
        "width {}": ("embeddings.class_embedding", 0),
        "patches of {} pixels": ("embeddings.patch_embedding.weight", 3),
        "{} positions": ("embeddings.position_embedding.weight", 0),
        "MLPs of {}": ("encoder.layers.0.mlp.fc1.weight", 0),
    }
    found = {
        fact: shapes[name][side] for fact, (name, side) in sides.items() if len(shapes.get(name, ())) > side
    }
    layers = {layer[1] for name in shapes if (layer := re.match(r"encoder\.layers\.(\d+)\.", name))}
    return found | ({"{} layers": len(layers)} if layers else {})


def leave_out_hint(extra: Iterable[str]) -> str:
    """How to read models without tensors that the base does not have, as short beginnings of their names."""
    starts: dict[str, None] = {}
    for name in sorted(extra):
        tower = VISION if name.startswith(VISION) else ""
        first, dot, _ = name.removeprefix(tower).partition(".")
        starts[tower + first + dot] = None
    return f"`leave_out = {toml_text(list(starts)[:8])}` in the recipe, or with `merge --set`, reads the models without them"


def lead_hint(have: Checkpoint, want: Iterable[str]) -> str:
    """What to do with a checkpoint that has all wanted names, but after a beginning of its own; empty if it has not."""
    names = list(want)
    for each in have.entries if names else ():
        lead = each.removesuffix(names[0])
        if lead != each and lead.endswith(".") and all(lead + name in have.entries for name in names):
            return f"{have.path} has the names of the others after `{lead}`: save its tensors without that"
    return ""
