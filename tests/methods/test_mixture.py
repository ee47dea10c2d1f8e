"""What methods of several towers share."""

from __future__ import annotations

import pytest
import torch

from mergecli import methods
from mergecli.methods._base import TwoPass
from mergecli.methods._mixture import Conditioned
from tests.support.mixture_files import BASE, TUNED, InMemory, all_same, towers, written

CONDITIONED = ["emr", "tall_mask", "tsv_c"]


@pytest.mark.parametrize("name", CONDITIONED)
def test_files_in_half_precision_give_towers_in_float32(name: str) -> None:
    method = methods.create(name, {})
    assert isinstance(method, Conditioned)
    file = written(method, BASE, TUNED)
    want = towers(name, BASE, TUNED)
    half = {key: each.bfloat16() if each.dtype.is_floating_point else each for key, each in file.items()}
    half |= method.values(method.survey(InMemory(BASE, TUNED)) if isinstance(method, TwoPass) else None)
    got = [{each: method.weights(each, place, half.__getitem__) for each in want[0]} for place in range(3)]
    all_same(got, want, atol=0.06)  # bfloat16 keeps 8 bits of weights up to 8


@pytest.mark.parametrize("name", [*CONDITIONED, "smile"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (1, 1), (4, 3), (2, 3, 2, 2)])
def test_tasks_equal_to_the_base_have_its_tower_whatever_its_shapes(
    name: str, shape: tuple[int, ...]
) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    base = {"patch": value, "mlp.fc1.weight": value, "q_proj.bias": value}
    for tasks in (1, 13):
        all_same(towers(name, base, [base] * tasks), [base] * tasks)
