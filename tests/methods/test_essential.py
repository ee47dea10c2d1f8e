"""The directions of a layer's output in which a task vector matters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergecli.methods._essential import congruent, essential_directions


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "rows", [100, 7], ids=["more inputs than features", "fewer, so that some eigenvalues are 0"]
)
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (12, 12), (70, 300), (300, 70)])
def test_they_are_the_right_singular_vectors_of_the_outputs(shape: tuple[int, int], rows: int) -> None:
    inputs, delta = some(rows, shape[1], seed=1), some(*shape, seed=2)
    _, want, right = torch.linalg.svd(inputs @ delta.T, full_matrices=False)
    directions, values = essential_directions(delta, inputs.T @ inputs, 5)
    assert torch.allclose(values, want[:5].square(), rtol=1e-10)
    assert torch.allclose((directions.T @ right[:5].T).abs(), torch.eye(5).double(), atol=1e-7)


def test_directions_that_do_not_matter_are_0() -> None:
    inputs, delta = some(3, 12, seed=1), some(40, 12, seed=2)
    directions, values = essential_directions(delta, inputs.T @ inputs, 5)
    assert values.count_nonzero() == 3
    assert directions.any(0).tolist() == [True] * 3 + [False] * 2


def test_eigenvalues_that_rounding_has_made_negative_count_as_0() -> None:
    square = some(12, 12, seed=3)
    values, vectors = torch.linspace(-1e-9, 1, 12).double(), torch.linalg.qr(square).Q
    delta = some(40, 12, seed=2)
    found = essential_directions(delta, (vectors * values) @ vectors.T, 12)[1]
    want = torch.linalg.svdvals(delta @ (vectors * values.clamp(min=0).sqrt())).square()
    assert torch.allclose(found, want, atol=1e-10)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 300])
def test_half_of_a_symmetric_matrix_is_enough(size: int) -> None:
    matrix, square = some(5, size, seed=1), some(size, size, seed=2)
    square = square + square.T
    assert float((congruent(matrix, square) - matrix @ square @ matrix.T).abs().max()) < 1e-10
