"""RegMean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergecli.merging.learning.measure import measure
from tests.conftest import Weights, assert_same
from tests.methods.reference._linear_layers import least_squares
from tests.methods.reference.reg_mean import reg_mean
from tests.support.image_zoo import FEW, Zoo, measured_merge
from tests.support.statistics_in_memory import Given, combine, grams, some

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.mark.parametrize(("ratio", "ridge"), [(0.95, 0.0), (0.5, 0.1), (0.0, 0.0)])
def test_reg_mean_is_the_published_formula(
    zoo: Zoo, layer_inputs: list[Weights], ratio: float, ridge: float
) -> None:
    got = measured_merge(zoo, "reg_mean", reduce_non_diagonal_ratio=ratio, ridge=ridge)
    want = reg_mean(list(zoo.tuned.values()), layer_inputs, ratio, ridge)
    assert_same(got, want, atol=5e-6)


def test_reg_mean_without_shrinking_is_one_least_squares_problem(
    zoo: Zoo, layer_inputs: list[Weights]
) -> None:
    got = measured_merge(zoo, "reg_mean", reduce_non_diagonal_ratio=1)
    for name in layer_inputs[0]:
        want = least_squares(
            [model[name] for model in zoo.tuned.values()], [each[name] for each in layer_inputs]
        )
        # the matrices are kept as float32: 6e-8, times their condition, which is some 1e3 here
        assert torch.allclose(got[name].double(), want, atol=2e-4), name


@pytest.mark.parametrize("ratio", [0.0, 0.95, 1.0])
def test_inputs_that_are_all_alike_give_the_average(ratio: float) -> None:
    rows = some(3, 6, 4)
    got = combine("reg_mean", grams(*[torch.eye(4)] * 3), rows, reduce_non_diagonal_ratio=ratio)
    assert torch.allclose(got, rows.mean(0), atol=1e-7)


def test_one_model_and_the_same_model_twice_are_given_back() -> None:
    rows, other = some(1, 6, 4), some(6, 4, seed=1).square()
    assert combine("reg_mean", grams(other.T @ other), rows).equal(rows[0])
    two = grams(other.T @ other, torch.eye(4))
    assert combine("reg_mean", two, rows.repeat(2, 1, 1)).equal(rows[0])


def test_the_order_of_tasks_matters_only_to_the_last_bits() -> None:
    rows = some(3, 6, 4)
    given = grams(*(x.T @ x for x in (some(40, 4, seed=seed) for seed in (1, 2, 3))))
    turned = Given(*reversed(given.files))
    got = combine("reg_mean", turned, rows.flip(0))
    assert torch.allclose(combine("reg_mean", given, rows), got, atol=1e-6)


def test_keys_queries_and_values_have_one_input(
    zoo: Zoo, layer_inputs: list[Weights], tmp_path: Path
) -> None:
    done = measure(zoo.recipe, method="reg_mean", settings=FEW, output=tmp_path / "s")
    for each, path in zip(layer_inputs, done.paths.values(), strict=True):
        got = load_file(path)
        assert len(got) == 2 * 4
        for name, x in each.items():
            assert torch.equal(x, each[name.replace("q_proj", "k_proj").replace("v_proj", "k_proj")])
            if f"{name}.gram" in got:
                want = x.T @ x / len(x)
                assert torch.allclose(got[f"{name}.gram"].double(), want, atol=1e-6 * float(want.max()))
                assert got[f"{name}.gram"].equal(got[f"{name}.gram"].T)
