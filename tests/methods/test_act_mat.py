"""ACTMat and TACT."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergecli.methods._base import Group
from mergecli.methods.act_mat import ActMat
from mergecli.methods.wudi import Wudi
from tests.conftest import World, assert_same
from tests.methods.reference.act_mat import act_mat
from tests.support.layered_world import layered_world
from tests.support.merging import merged, with_integers


@pytest.mark.parametrize("tasks", [1, 2, 3, 13])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.01])
def test_act_mat_equals_a_pseudo_inverse_in_float64(tmp_path: Path, tasks: int, density: float) -> None:
    world = layered_world(tmp_path, tasks)
    want = act_mat(world.base, list(world.tuned.values()), density)
    assert_same(merged(world, "act_mat", density=density), with_integers(want, world), atol=2e-6)


def test_a_position_embedding_that_is_a_table_is_averaged(layered: World) -> None:
    name = "embeddings.position_embedding.weight"
    got = merged(layered, "act_mat", position_embedding="table")
    assert torch.allclose(got[name], merged(layered, "average")[name], atol=1e-6)


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(*deltas: Tensor, method: ActMat | Wudi | None = None) -> Tensor:
    """M of one matrix."""
    rows = torch.stack([delta.float() for delta in deltas])
    names = tuple(f"t{number}" for number in range(len(deltas)))
    group = Group("layers.0.fc.weight", torch.zeros(rows.shape[1:]), rows, (True,) * len(rows), names)
    return (method or ActMat()).merge(group).double()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_one_task_and_equal_tasks_give_that_task(shape: tuple[int, int]) -> None:
    delta = some(*shape)
    assert torch.allclose(solved(delta), delta, atol=1e-6)
    assert torch.allclose(solved(delta, delta, delta), delta, atol=1e-6)
    assert torch.allclose(solved(delta, torch.zeros(shape)), delta, atol=1e-6)


def test_task_vectors_with_orthogonal_rows_are_added() -> None:
    rows = torch.linalg.qr(some(8, 8)).Q
    one, two = some(5, 3, seed=1) @ rows[:3], some(5, 4, seed=2) @ rows[3:7]
    assert torch.allclose(solved(one, two), one + two, atol=1e-6)


@pytest.mark.parametrize("method", [ActMat(), Wudi(solver="ridge"), Wudi(solver="spectral")])
def test_a_rotation_of_inputs_or_outputs_is_passed_on(method: ActMat | Wudi) -> None:
    deltas = [some(6, 4, seed=seed) for seed in (1, 2, 3)]
    inputs, outputs = torch.linalg.qr(some(4, 4)).Q, torch.linalg.qr(some(6, 6)).Q
    want = solved(*deltas, method=method)
    assert torch.allclose(solved(*[d @ inputs for d in deltas], method=method), want @ inputs, atol=1e-5)
    assert torch.allclose(solved(*[outputs @ d for d in deltas], method=method), outputs @ want, atol=1e-5)


def test_with_task_vectors_of_one_length_it_is_the_minimum_of_wudi() -> None:
    deltas = [some(6, 4, seed=seed) for seed in (1, 2, 3)]
    deltas = [delta / delta.norm() for delta in deltas]
    for method in (Wudi(solver="ridge", ridge=0), Wudi(solver="spectral", rank=4)):
        assert torch.allclose(solved(*deltas), solved(*deltas, method=method), atol=1e-5)


def test_directions_below_the_cutoff_are_left_out() -> None:
    strong, weak = torch.zeros(3, 2), torch.zeros(3, 2)
    strong[0, 0], weak[1, 1] = 1.0, math.sqrt(3 * 2.0**-23) * 0.99
    got = solved(strong, weak)
    assert float(got[0, 0]) == 1
    assert float(got[1, 1]) == 0
    weak[1, 1] *= 1.02
    assert float(solved(strong, weak)[1, 1]) == pytest.approx(float(weak[1, 1]))
