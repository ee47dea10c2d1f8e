"""Decompositions through Gram matrices, and which tensors are matrices."""

from __future__ import annotations

import pytest
import torch

from mergecli.methods._base import Group
from mergecli.methods._svd import decompose, gram, is_matrix, polar, polar_times
from tests.conftest import World, assert_same
from tests.support.merging import merged

POSITION = "embeddings.position_embedding.weight"


@pytest.mark.parametrize("shape", [(9, 9), (20, 6), (6, 20), (1, 5), (5, 1), (0, 3), (3, 0)])
def test_a_decomposition_through_the_gram_matrix_is_the_full_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, values, right = decompose(matrix)
    want = torch.linalg.svdvals(matrix.double())
    assert float((values - want).abs().sum()) < 1e-10
    assert float(((left * values) @ right.T - matrix).abs().sum()) < 1e-10
    if min(shape):
        u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        assert float((polar(matrix)[0] - u @ v).abs().max()) < 1e-10
    first = decompose(matrix, 1)
    assert first[0].shape == (shape[0], min(1, *shape))


def test_singular_values_over_five_orders_of_magnitude_are_found() -> None:
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 30, generator=generator).double())[0] for n in (40, 30))
    want = torch.logspace(0, -5, 30, dtype=torch.float64)
    left, values, right = decompose((u * want) @ v.T)
    assert float((values / want - 1).abs().max()) < 1e-5
    assert float((left.T @ left - torch.eye(30)).abs().max()) < 1e-5
    assert float((right.T @ right - torch.eye(30)).abs().max()) < 1e-10


def test_directions_of_negligible_singular_values_are_left_out() -> None:
    column = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    matrix = column @ column[:5].T
    left, values, right = decompose(matrix)
    assert values.count_nonzero() == 2
    assert left.any(0).tolist() == right.any(0).tolist() == [True, True, False, False, False]
    factor, _ = polar(matrix)
    assert float((factor @ factor.T @ factor - factor).abs().max()) < 1e-10
    assert torch.linalg.matrix_rank(factor) == 2
    assert not polar(torch.zeros(4, 3))[0].any()


@pytest.mark.parametrize("shape", [(9, 9), (20, 6), (6, 20), (0, 3), (3, 0)])
@pytest.mark.parametrize("rank", [2, 20])
def test_a_polar_factor_times_a_matrix_is_the_product(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape[0], rank, generator=generator) @ torch.randn(
        rank, shape[1], generator=generator
    )
    other = torch.randn(shape[1], 4, generator=generator).double()
    (factor, want), (product, values) = polar(matrix), polar_times(matrix, other)
    assert torch.allclose(product, factor @ other, atol=1e-10)
    assert torch.allclose(values, want)


def test_half_a_gram_matrix_is_enough() -> None:
    matrix = torch.randn(30, 300, generator=torch.Generator().manual_seed(1)).double()
    assert float((gram(matrix) - matrix.T @ matrix).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("embeddings.position_embedding.weight", True), ("visual.positional_embedding", True),
        ("pos_embed", True), ("layers.0.fc.weight", False), ("embed_positions.fc.weight", False),
    ],
)  # fmt: skip
def test_a_table_of_positions_is_known_by_its_name(name: str, table: bool) -> None:
    group = Group(name, None, torch.zeros(1, 3, 4), (True,), ("t1",))
    assert is_matrix(group, "table") is not table
    assert is_matrix(group, "matrix")


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "wudi", "ace_merging"])
def test_the_position_embedding_is_averaged_unless_it_is_called_a_matrix(layered: World, method: str) -> None:
    few = {"steps": 3} if method == "wudi" else {}
    average = merged(layered, "average")[POSITION]
    assert_same({POSITION: merged(layered, method, **few)[POSITION]}, {POSITION: average}, atol=1e-6)
    as_matrix = merged(layered, method, position_embedding="matrix", **few)
    assert float((as_matrix[POSITION] - average).abs().max()) > 1e-3
