"""Coordinates of low rank lose nothing, and are those of the papers, by plain decompositions of whole matrices in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mergecli.merging.spaces import Coordinates, Scaled, core_space, knots

Space = Callable[[Sequence[Scaled | None]], Coordinates]
SPACES = [pytest.param(core_space, id="core"), pytest.param(knots, id="knots")]


def adapter(rank: int, seed: int, scaling: float = 1.0, shape: tuple[int, int] = (12, 20)) -> Scaled:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    return left, torch.randn(rank, shape[1], generator=generator, dtype=torch.float64), scaling


def change(each: Scaled | None, like: Scaled) -> Tensor:
    if each is None:
        return torch.zeros(like[0].shape[0], like[1].shape[1], dtype=torch.float64)
    return each[2] * each[0] @ each[1]


ONE = adapter(3, 1)
ZERO = torch.zeros(12, 2, dtype=torch.float64), adapter(2, 5)[1], 1.0
CASES: dict[str, list[Scaled | None]] = {
    "one adapter": [ONE],
    "ranks and scalings of their own": [adapter(2, 1, 0.25), adapter(4, 2, 3.0), adapter(1, 3, -1.0)],
    "modules that not all have": [None, adapter(3, 2, 2.0), None, adapter(2, 3)],
    "the same twice": [ONE, ONE, adapter(2, 4)],
    "the same with another scaling": [ONE, (ONE[0], ONE[1], 5.0)],
    "more ranks than the weight has": [adapter(8, seed, 0.5) for seed in range(4)],
    "one that was not trained": [ONE, ZERO],
    "none that was trained": [ZERO],
    "sizes that are far apart": [adapter(2, 1, 1e-5), adapter(2, 2, 1e4)],
}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("case", CASES)
def test_what_is_lifted_is_the_change_of_every_adapter(space: Space, case: str) -> None:
    adapters = CASES[case]
    first = next(each for each in adapters if each is not None)
    changes = [change(each, first) for each in adapters]
    rounding = 1e-14 * max(float(each.norm()) for each in changes)
    found = space(adapters)
    for want, core in zip(changes, found.cores, strict=True):
        left, right = found.lift(core)
        torch.testing.assert_close(left @ right, want, atol=rounding, rtol=0)


@pytest.mark.parametrize("space", SPACES)
def test_a_sum_of_cores_is_the_core_of_the_sum(space: Space) -> None:
    adapters = [adapter(2, 1, 0.25), adapter(4, 2, 3.0), None, adapter(1, 3)]
    found = space(adapters)
    left, right = found.lift(sum(found.cores, torch.zeros_like(found.cores[0])))
    torch.testing.assert_close(left @ right, sum(change(each, ONE) for each in adapters), atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_core_space_is_spanned_by_the_singular_vectors_of_the_stacked_factors(case: str) -> None:
    adapters = [each for each in CASES[case] if each is not None]
    found = core_space(adapters)
    stacks = torch.cat([b for b, _, _ in adapters], 1), torch.cat([a for _, a, _ in adapters]).T
    assert found.right is not None
    for basis, stack in zip((found.left, found.right.T), stacks, strict=True):
        u, values, _ = torch.linalg.svd(stack, full_matrices=False)
        rank = max(1, int((values > 1e-9 * values[0]).sum()))
        assert basis.shape[1] == rank
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-12, rtol=0)
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        assert bool((largest > 0).all())
        if float(values[0]):  # vectors are the same but for their signs, which are ours
            overlaps = (u[:, :rank].T @ basis).abs()
            torch.testing.assert_close(overlaps, torch.eye(rank, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_core_is_the_whole_change_between_the_bases() -> None:
    adapters = [adapter(2, 1, 0.25), adapter(4, 2, 3.0), None]
    found = core_space(adapters)
    assert found.right is not None
    for each, core in zip(adapters, found.cores, strict=True):
        want = found.left.T @ change(each, ONE) @ found.right.T
        torch.testing.assert_close(core, want, atol=1e-12, rtol=0)


def test_knots_merges_the_right_singular_vectors_of_all_changes_beside_each_other() -> None:
    adapters = [adapter(2, 1, 0.25), adapter(3, 2, 2.0), None]
    found = knots(adapters)
    beside = torch.cat([change(each, ONE) for each in adapters], dim=1)
    u, values, v = torch.linalg.svd(beside, full_matrices=False)
    assert found.left.shape == (12, 5)
    signs = (u[:, :5] * found.left).sum(0).sign()
    torch.testing.assert_close(found.left, u[:, :5] * signs, atol=1e-9, rtol=0)
    parts = (signs[:, None] * values[:5, None] * v[:5]).split(20, dim=1)
    for core, want in zip(found.cores, parts, strict=True):
        torch.testing.assert_close(core, want, atol=1e-9, rtol=0)


def test_the_bases_of_the_same_adapters_in_another_order_are_the_same() -> None:
    adapters = [adapter(2, 1, 0.25), adapter(3, 2, 2.0)]
    one, other = core_space(adapters), core_space(adapters[::-1])
    torch.testing.assert_close(one.left, other.left, atol=1e-9, rtol=0)
    torch.testing.assert_close(one.cores[0], other.cores[1], atol=1e-9, rtol=0)
