"""Some eigenvectors of a symmetric matrix, against matrices that are made from theirs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergecli.methods._eigenspace import Eigenspace, Eigenspaces

SIZE = 256
"""Smaller than the methods ask for: what is sought does not depend on it."""


@pytest.fixture(scope="module")
def vectors() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator).double()).Q


def sought(vectors: Tensor, values: Tensor, count: int, end: str) -> Eigenspace | None:
    spaces = Eigenspaces((vectors * values) @ vectors.T)
    return spaces.largest(count) if end == "largest" else spaces.smallest(count)


def assert_found(found: Eigenspace | None, vectors: Tensor, values: Tensor, count: int, end: str) -> None:
    assert found is not None
    order = values.argsort(descending=end == "largest")
    wanted = vectors[:, order[:count]]
    assert float((found.values - values[order[:count]]).abs().max()) < 1e-12
    assert found.following == pytest.approx(float(values[order[count]]), abs=1e-9)
    assert float((found.vectors.T @ found.vectors - torch.eye(count)).norm()) < 1e-12
    assert float((wanted - found.vectors @ (found.vectors.T @ wanted)).norm()) < 1e-7


ONES = torch.ones(SIZE).double()
PLACES = torch.arange(1, SIZE + 1).double()
SPECTRA = {
    "flat": torch.linspace(0.9, 1, SIZE).double(),
    "falling slowly": PLACES**-0.5,
    "falling fast": PLACES**-2,
    "one far above all": torch.cat([torch.tensor([1e3]).double(), torch.linspace(0.5, 1, SIZE - 1).double()]) / 1e3,
    "most of them 0": PLACES.le(60) / PLACES,
    "equal ones among the wanted": torch.cat([torch.full((10,), 2.0).double(), torch.linspace(0.1, 1, SIZE - 10).double()]),
    "equal ones beyond": torch.cat([torch.linspace(1, 2, 80).double(), torch.full((SIZE - 80,), 0.5).double()]),
}  # fmt: skip


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA.keys())
def test_the_largest_are_found_as_closely_as_by_float64(vectors: Tensor, values: Tensor) -> None:
    assert_found(sought(vectors, values, 40, "largest"), vectors, values, 40, "largest")


@pytest.mark.parametrize("name", ["flat", "falling slowly"])
def test_so_are_the_smallest(vectors: Tensor, name: str) -> None:
    assert_found(sought(vectors, SPECTRA[name], 40, "smallest"), vectors, SPECTRA[name], 40, "smallest")


@pytest.mark.parametrize("factor", [1e-60, 1e60])
def test_matrices_beyond_the_range_of_float32_are_no_different(vectors: Tensor, factor: float) -> None:
    found = sought(vectors, factor * SPECTRA["flat"], 40, "largest")
    assert found is not None
    scaled = Eigenspace(found.values / factor, found.vectors, found.following / factor)
    assert_found(scaled, vectors, SPECTRA["flat"], 40, "largest")


@pytest.mark.parametrize(
    ("count", "end", "values"),
    [
        (40, "largest", torch.cat([torch.full((60,), 2.0).double(), torch.linspace(0, 1, SIZE - 60).double()])),
        (40, "largest", 1 + 1e-8 * PLACES),
        (40, "smallest", PLACES**-4),
        (40, "smallest", PLACES.le(60) / PLACES),
        (40, "largest", ONES),
        (0, "largest", SPECTRA["flat"]),
        (SIZE, "largest", SPECTRA["flat"]),
        (SIZE - 10, "largest", SPECTRA["flat"]),
    ],
    ids=["equal at the cut", "too near each other", "too small beside the largest", "which of many that are 0",
         "all equal", "none", "all", "nearly all"],
)  # fmt: skip
def test_what_float32_cannot_tell_apart_is_not_claimed(
    vectors: Tensor, count: int, end: str, values: Tensor
) -> None:
    assert sought(vectors, values, count, end) is None


def test_every_value_is_within_its_error(vectors: Tensor) -> None:
    for values in SPECTRA.values():
        spaces = Eigenspaces((vectors * values) @ vectors.T)
        assert float((spaces.values - values.sort().values).abs().max()) < spaces.error
