"""The file that an interrupted training leaves beside its output: whose it is, and what stands in it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mergecli.checkpoint import open_checkpoint
from mergecli.errors import InputError, MergecliWarning, UsageError, listed, shown

if TYPE_CHECKING:
    from torch import Tensor, nn

MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}
FACTS = ("step", "updates", "best_step", "scale", "growth")


def state_file(output: Path) -> Path:
    """Where the state of what trains `output` is kept."""
    return output.with_name(f".{output.name.removesuffix('.safetensors')}.resume.safetensors")


@dataclass(frozen=True)
class Stored:
    """What stands in a file."""

    facts: Mapping[str, float]
    tensors: Mapping[str, Tensor]


def work_text(work: Mapping[str, Any]) -> str:
    """What a training depends on, settings, base, images, as the metadata of its state has it."""
    return json.dumps(work)


def read_state(
    path: Path, work: Mapping[str, Any], parameters: Mapping[str, nn.Parameter], tasks: int
) -> Stored | None:
    """What stands in the file; None if there is none, or it is damaged, which is warned of.

    Raises:
        UsageError: it is of other work; every difference is named.
    """
    if not path.exists():
        return None
    try:
        with open_checkpoint(path) as stored:
            known: Any = json.loads(stored.metadata["work"])
            differing = list(_differences(known, json.loads(work_text(work))))
            facts: dict[str, float] = {}
            tensors: dict[str, Tensor] = {}
            if not differing:
                told: Any = json.loads(stored.metadata["facts"])
                facts = {name: float(told[name]) for name in FACTS}
                parts = ["weights", *MOMENTS, *(["best"] if facts["best_step"] else [])]
                names = [f"{part}.{name}" for part in parts for name in parameters]
                tensors = {name: stored.read(name) for name in [*names, "losses", "validation"]}
                _expect_sound(facts, tensors, parameters, tasks)
    except (InputError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        text = f"{path}: is damaged, or of another version: training begins anew"
        warnings.warn(text, MergecliWarning, stacklevel=2)
        return None
    if differing:
        raise UsageError(
            f"{path}: holds the state of a training that was begun otherwise:\n{listed(differing, 10)}",
            "give the same settings to go on, or `--fresh` (`fresh=True`) to begin anew",
        )
    return Stored(facts, tensors)


def _expect_sound(
    facts: Mapping[str, float],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    tasks: int,
) -> None:
    """Raises ValueError unless shapes and numbers are those of a state."""
    measured = tensors["validation"]
    is_sound = all(
        each.shape == parameters[name.partition(".")[2]].shape
        for name, each in tensors.items()
        if name not in ("losses", "validation")
    )
    is_sound &= tensors["losses"].shape == (int(facts["step"]), tasks)
    is_sound &= measured.dim() == 2 and measured.shape[1] == 1 + tasks
    is_sound &= all(bool(each.isfinite().all()) for each in tensors.values())
    is_sound &= facts["best_step"] in {0.0, *measured.flatten()[:: tasks + 1].tolist()}
    if not is_sound:
        raise ValueError("not a state")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """`name: old -> new` for whatever differs, tables entry by entry."""
    for name in dict.fromkeys([*new, *old]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) or isinstance(after, dict):
            yield from _differences(_table(before), _table(after), f"{within}{name}.")
        elif before != after:
            yield f"`{within}{name}`: {_said(before)} -> {_said(after)}"


def _table(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _said(value: object) -> str:
    return "none" if value is None else shown(value)
