"""Linear layers merged by least squares, from sums over their inputs; by way of RegMean, whose formula it is."""

from __future__ import annotations

import pytest
import torch

from tests.methods.reference._linear_layers import least_squares
from tests.support.statistics_in_memory import combine, grams, some


def test_inputs_that_no_image_shows_keep_the_mean_and_the_rest_is_solved() -> None:
    rows = some(2, 5, 6)
    seen = [some(40, 6, seed=seed) for seed in (1, 2)]
    for each in seen:
        each[:, 2] = 0  # never
        each[:, 4] = 2 * each[:, 3]  # never apart
    got = combine(
        "reg_mean", grams(*(x.T @ x / 40 for x in seen)), rows, reduce_non_diagonal_ratio=1
    ).double()
    middle = rows.double().mean(0)
    assert torch.allclose(got[:, 2], middle[:, 2], atol=1e-7)
    left = [x.double() @ (got - row.double()).T for x, row in zip(seen, rows, strict=True)]
    best = least_squares(list(rows), [x.double() for x in seen])
    least = [x.double() @ (best - row.double()).T for x, row in zip(seen, rows, strict=True)]
    assert float(torch.cat(left).square().sum()) == pytest.approx(
        float(torch.cat(least).square().sum()), rel=1e-6
    )
    change = got - middle  # of inputs that are the same in their own spread, each takes half
    assert torch.allclose(change[:, 3], 2 * change[:, 4], atol=1e-5)


def test_fewer_rows_than_inputs_give_what_each_task_gave_if_that_can_be() -> None:
    rows = some(2, 5, 30)
    seen = [some(10, 30, seed=seed) for seed in (1, 2)]
    got = combine("reg_mean", grams(*(x.T @ x / 10 for x in seen)), rows, reduce_non_diagonal_ratio=1)
    for x, row in zip(seen, rows, strict=True):
        assert torch.allclose(x @ got.T, x @ row.T, atol=1e-4)


def test_a_large_ridge_gives_the_average() -> None:
    rows, x = some(2, 5, 6), some(40, 6, seed=1)
    got = combine("reg_mean", grams(x.T @ x, torch.eye(6)), rows, ridge=1e9)
    assert torch.allclose(got, rows.mean(0), atol=1e-6)
