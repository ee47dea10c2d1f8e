"""A product of factors is cut as its whole matrix would be, and says what it loses."""

from __future__ import annotations

import math

import pytest
import torch

from mergecli.merging.low_rank import Change, dropped, factored, refactored, relative


def product() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    return left, torch.randn(5, 14, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3, 5, 8, None])
def test_a_product_is_cut_to_the_best_approximation_of_its_rank(rank: int | None) -> None:
    left, right = product()
    found = refactored(left, right, rank, "float32")
    u, values, v = torch.linalg.svd(left @ right, full_matrices=False)
    kept = min(rank or 5, 5)
    assert found.factors is not None
    assert found.rank == kept
    got = found.factors[0].double() @ found.factors[1].double()
    want = (u[:, :kept] * values[:kept]) @ v[:kept]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert relative([found]) == pytest.approx(
        math.sqrt(values[kept:].square().sum() / values.square().sum()), abs=1e-7
    )
    assert found.norm == pytest.approx(float((left @ right).square().sum()))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_rounding_loses_counts(dtype: str) -> None:
    left, right = product()
    found = refactored(left, right, None, dtype)
    assert found.factors is not None
    whole = left @ right
    lost = whole - found.factors[0].double() @ found.factors[1].double()
    assert relative([found]) == pytest.approx(float(lost.norm() / whole.norm()), rel=0.05, abs=3e-8)


def test_whole_changes_and_products_are_cut_alike() -> None:
    left, right = product()
    one, other = refactored(left, right, 2, "float32"), factored((left @ right).float(), 2, None, "float32")
    assert one.factors is not None
    assert other.factors is not None
    torch.testing.assert_close(
        one.factors[0] @ one.factors[1], other.factors[0] @ other.factors[1], atol=1e-5, rtol=0
    )
    assert relative([one]) == pytest.approx(relative([other]), rel=1e-5)


def test_no_change_loses_nothing_and_has_no_direction() -> None:
    found = refactored(
        torch.zeros(4, 2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64), None, "float32"
    )
    assert found.factors is not None
    assert not bool((found.factors[0] @ found.factors[1]).any())
    assert relative([found]) == 0
    assert relative([dropped(torch.zeros(3))]) == 0
    assert relative([dropped(torch.ones(3)), Change(1.0, 0.0)]) == pytest.approx(math.sqrt(3 / 4))
