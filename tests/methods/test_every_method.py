"""What every method keeps to, whatever it computes: one table, and the same tests for all."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mergecli import methods
from mergecli.merging import models
from mergecli.methods._base import DataDriven, Group, Method, TwoPass, merge_group
from mergecli.methods._mixture import Mixture
from tests.conftest import Weights, World, assert_same
from tests.support.layered_world import layered_world
from tests.support.merging import merged, same_bytes, with_models

HERE = Path(__file__).parent
SETTINGS: dict[str, dict[str, Any]] = {
    "weighted_average": {"weights": [1, 2, 3]},
    "tall_mask": {"task": "t2"},
    "wudi": {"steps": 5},
    "doge_ta": {"steps": 5},
    "dop": {"steps": 5},
    "nufilt": {"steps": 5},
}
"""Settings that are required, or spare time; weights as many as there are tasks."""
TWO = ("linear", "slerp")
AT_LEAST = {"linear": 2, "slerp": 2, "model_stock": 2, "consensus": 2, "tall_mask": 2}
ORDERED = ("linear", "slerp", "weighted_average", "opcm", "dop", "nufilt")
OF_WEIGHTS = ("average", "weighted_average", "linear", "slerp", "karcher", "model_stock", "dop")
"""Methods that add up whole weights, which rounds; the others add to the base what is 0 where tasks are equal to it."""
NAMES = [
    name
    for name in methods.names()
    if not issubclass(methods.find(name), DataDriven)
    and (name in SETTINGS or not issubclass(methods.find(name), Mixture))
]
"""All but those that look at images or give more than one tower, which have tests of their own."""


def settings_for(method: str, tasks: int) -> dict[str, Any]:
    given = dict(SETTINGS.get(method, {}))
    if "weights" in given:
        given["weights"] = list(range(1, tasks + 1))
    return given


def merge_all(world: World, method: str, tasks: list[str] | None = None, **more: Any) -> Weights:
    """The merge of the world's models, of the first two where a method takes no more."""
    chosen = tasks or list(world.files)
    chosen = chosen[:2] if method in TWO else chosen
    return merged(world, method, chosen, **{**settings_for(method, len(chosen)), **more})


@pytest.mark.parametrize("name", methods.names())
def test_a_method_has_a_test_against_a_reference_of_its_own(name: str) -> None:
    reference = ast.parse((HERE / "reference" / f"{name}.py").read_text("utf-8"))
    assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in reference.body)
    test = list(ast.walk(ast.parse((HERE / f"test_{name}.py").read_text("utf-8"))))
    module = f"tests.methods.reference.{name}"
    imports = [node for node in test if isinstance(node, ast.ImportFrom) and node.module == module]
    assert name in [alias.name for node in imports for alias in node.names], "the test imports it"
    assert name in [node.id for node in test if isinstance(node, ast.Name)], "a test compares with it"


@pytest.mark.parametrize("method", NAMES)
def test_tasks_equal_to_the_base_give_the_base(layered: World, method: str) -> None:
    same = with_models(layered, layered.base, *[layered.base] * 3)
    assert_same(merge_all(same, method), layered.base, atol=1e-6 if method in OF_WEIGHTS else 0)


@pytest.mark.parametrize("method", [name for name in NAMES if "scaling_factor" in methods.settings(name)])
def test_a_scaling_factor_of_zero_gives_the_base(layered: World, method: str) -> None:
    assert_same(merge_all(layered, method, scaling_factor=0), layered.base)


@pytest.mark.parametrize(
    ("method", "tasks"),
    [(name, tasks) for name in NAMES for tasks in (1, 2, 13) if tasks >= AT_LEAST.get(name, 1)],
)
def test_one_task_and_more_tasks_than_ranks_are_merged(tmp_path: Path, method: str, tasks: int) -> None:
    world = layered_world(tmp_path, tasks)
    got = merge_all(world, method)
    assert all(bool(value.isfinite().all()) for value in got.values())
    assert any(not got[name].equal(world.base[name]) for name in got)


@pytest.mark.parametrize("method", NAMES)
def test_a_repeated_model_and_one_equal_to_the_base_are_merged(tmp_path: Path, method: str) -> None:
    world = layered_world(tmp_path, 2)
    first, second = world.tuned.values()
    other = with_models(world, world.base, first, world.base, first, second)
    assert all(bool(value.isfinite().all()) for value in merge_all(other, method).values())


@pytest.mark.parametrize("method", [name for name in NAMES if name not in ORDERED])
def test_the_order_of_tasks_matters_only_to_the_last_bits(layered: World, method: str) -> None:
    """Descent amplifies what rounding did to the gradient."""
    atol = 1e-4 if method in ("wudi", "doge_ta") else 1e-6
    one, other = (merge_all(layered, method, order) for order in (["t3", "t1", "t2"], ["t1", "t2", "t3"]))
    assert_same(one, other, atol)


@pytest.mark.parametrize("method", NAMES)
def test_blocks_threads_and_passes_change_no_byte(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    want = merge_all(world, method)
    for block, processors in (
        (61, 1),
        (999, 3),
    ):  # neither is a multiple of what a processor computes at once
        monkeypatch.setattr(models, "BLOCK", block)
        monkeypatch.setattr(os, "cpu_count", lambda count=processors: count)
        same_bytes(merge_all(world, method), want)


@pytest.mark.parametrize("method", [name for name in NAMES if name != "opcm"])  # it looks up what it surveyed
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (1, 1), (4, 3), (2, 3, 2, 2)])
def test_a_group_of_any_shape_is_merged_and_the_base_is_only_read(
    method: str, shape: tuple[int, ...]
) -> None:
    tasks = ("t1", "t2") if method in TWO else ("t1", "t2", "t3")
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(1 + len(tasks), *shape, generator=generator)
    before = rows[0].clone()
    group = Group("encoder.layers.0.weight", rows[0], rows[1:], (False,) * len(tasks), tasks)
    chosen = methods.create(method, settings_for(method, len(tasks)))
    got = merge_group(chosen, group, survey_of(chosen, len(tasks)))
    assert got.dtype == torch.float32
    assert got.shape == shape
    assert bool(got.isfinite().all())
    assert rows[0].equal(before)


class OneTensor:
    """Passes over models of one small tensor."""

    tensors = ("encoder.layers.0.weight",)

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks

    def __call__(self, sample: int = 1) -> Iterator[Group]:
        rows = torch.randn(1 + self.tasks, 4, 5, generator=torch.Generator().manual_seed(4))
        names = tuple(f"t{number}" for number in range(1, self.tasks + 1))
        yield Group(self.tensors[0], rows[0], rows[1:], (False,) * self.tasks, names)

    def map(self, look: Any, sample: int = 1) -> Iterator[Any]:
        return map(look, self(sample))


def survey_of(method: Method, tasks: int) -> Any:
    """What the method knows after a survey of one small tensor."""
    return method.survey(OneTensor(tasks)) if isinstance(method, TwoPass) else None
