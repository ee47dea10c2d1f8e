"""The file that a method of several towers writes for models in memory, and the towers read back from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mergecli import methods
from mergecli.methods._base import Group, TwoPass
from mergecli.methods._mixture import Mixture, outcomes
from tests.conftest import Weights, assert_same, random_weights
from tests.support.layered_world import layered_weights

BASE = {**layered_weights(0), **random_weights(0)}
TUNED = [{**layered_weights(i, BASE), **random_weights(i, BASE)} for i in (1, 2, 3)]
"""Three models with tensors of every awkward shape."""
DTYPES = {"U8": torch.uint8, "F32": torch.float32, "same": torch.float32}


class InMemory:
    """One pass after another over models in memory, as methods see it."""

    def __init__(self, base: Weights, tuned: Sequence[Weights]) -> None:
        self.base, self.tuned = base, tuned
        self.tensors = sorted(name for name, value in base.items() if value.is_floating_point())

    def __call__(self, sample: int = 1) -> Iterator[Group]:
        tasks = tuple(f"t{number}" for number, _ in enumerate(self.tuned, 1))
        for name in self.tensors:
            rows = torch.stack([model[name] for model in self.tuned])
            yield Group(name, self.base[name].clone(), rows, (False,) * len(rows), tasks)

    def map(self, look: Callable[[Group], Any], sample: int = 1) -> Iterator[Any]:
        return map(look, self(sample))


def written(method: methods.Method, base: Weights, tuned: Sequence[Weights]) -> Weights:
    """The file's tensors: just those that the method announces, of the shapes and dtypes it announces."""
    assert isinstance(method, Mixture)
    groups, tasks = InMemory(base, tuned), len(tuned)
    learned = method.survey(groups) if isinstance(method, TwoPass) else None
    result: Weights = {}
    for group in groups():
        result |= outcomes(method, group, learned)
    result |= method.values(learned)
    shapes = {name: tuple(base[name].shape) for name in groups.tensors}
    parts = method.extras(shapes, tasks)
    for name, shape in shapes.items():
        parts |= method.parts(name, shape, tasks)
    assert {key: (each.dtype, tuple(each.shape)) for key, each in result.items()} == {
        key: (DTYPES[part.dtype], part.shape) for key, part in parts.items()
    }
    assert all(bool(each.isfinite().all()) for each in result.values())
    return result


def towers(name: str, base: Weights, tuned: Sequence[Weights], **settings: Any) -> list[Weights]:
    """Every task's tower, read from the file that a method writes."""
    method = methods.create(name, settings)
    assert isinstance(method, Mixture)
    read = written(method, base, tuned).__getitem__
    names = InMemory(base, tuned).tensors
    return [{each: method.weights(each, place, read) for each in names} for place, _ in enumerate(tuned)]


def all_same(got: Sequence[Weights], want: Sequence[Weights], atol: float = 0.0) -> None:
    """As many models, each the same."""
    for one, other in zip(got, want, strict=True):
        assert_same(one, other, atol)
