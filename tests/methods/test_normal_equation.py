"""The normal equation's solutions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mergecli.methods._normal_equation import MARGIN, NormalEquation, largest_eigenvalue, participation


def with_eigenvalues(values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator).double()).Q
    return (turned * values) @ turned.T


SPECTRA = {
    "flat": torch.linspace(1, 2, 200).double(),
    "steep": torch.logspace(-9, 0, 200).double(),
    "of equal values": torch.tensor([1.0] * 100 + [2.0] * 100).double(),
    "one": torch.tensor([3.0]).double(),
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA.keys())
def test_the_largest_eigenvalue_is_found_from_below(values: Tensor) -> None:
    found = largest_eigenvalue(with_eigenvalues(values)) / float(values[-1])
    assert 1 - MARGIN < found <= 1 + 1e-12


@pytest.mark.parametrize(("smallest", "is_kept"), [(1e-9, False), (0.999e-6, False), (1.001e-6, True), (1.2e-6, True), (0.1, True)])  # fmt: skip
def test_eigenvalues_up_to_the_cutoff_are_left_out_and_others_are_not(smallest: float, is_kept: bool) -> None:
    """Just above the cutoff, the eigenvectors are computed; well above it, none is."""
    root = with_eigenvalues(torch.tensor([smallest, 0.3, 0.5, 1.0]).double().sqrt())
    equation = NormalEquation()
    equation.add(root)
    want = (
        root if is_kept else root - (vector := torch.linalg.eigh(root).eigenvectors[:, :1]) @ vector.T @ root
    )
    assert torch.allclose(equation.truncated(1e-6), want, atol=1e-9)


def filled(deltas: list[Tensor]) -> NormalEquation:
    equation = NormalEquation()
    for delta in deltas:
        equation.add(delta, weight=1 / float(delta.square().sum()))
    return equation


def some(rows: int, power: float, seed: int) -> Tensor:
    """(rows, 520) whose singular values fall like 1 / n^power."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, rows, generator=generator).double()).Q for size in (rows, 520)
    )
    return (left * torch.arange(1, rows + 1).double() ** -power) @ right.T


@pytest.mark.parametrize(
    ("tasks", "rows", "power", "rank", "apart"),
    [(8, 130, 0, None, True), (4, 130, 2, None, True), (2, 60, 0.3, None, False), (8, 130, 0.5, None, False),
     (8, 130, 0, 500, True), (8, 130, 0.5, 30, True), (2, 60, 0, 300, False), (8, 130, 0, 520, False), (8, 65, 0, 520, False)],
    ids=["flat", "steep", "of low rank", "between", "flat, a rank given", "steep, a rank given",
         "a rank given above the matrix's", "every direction", "every direction, C just invertible"],
)  # fmt: skip
def test_a_cut_spectrum_is_that_of_all_eigenvectors(
    tasks: int, rows: int, power: float, rank: int | None, apart: bool
) -> None:
    deltas = [some(rows, power, seed) for seed in range(tasks)]
    start = torch.stack(deltas).sum(0)
    weights = [1 / delta.square().sum() for delta in deltas]
    left = torch.stack([w * d.T @ d for w, d in zip(weights, deltas, strict=True)]).sum(0)
    right = torch.stack([w * d @ d.T @ d for w, d in zip(weights, deltas, strict=True)]).sum(0)
    values, vectors = torch.linalg.eigh(left)
    kept = participation(values.clamp(min=0)) if rank is None else rank
    values, vectors = values[-kept:], vectors[:, -kept:]
    values, vectors = values[values > 1e-12 * values[-1]], vectors[:, values > 1e-12 * values[-1]]
    want = start + ((right - start @ left) @ vectors / values) @ vectors.T
    equation = filled(deltas)
    assert (equation._cut(start, rank) is not None) is apart
    assert float((equation.filtered(start, rank, math.inf) - want).norm()) < 1e-8 * float(want.norm())


def test_wide_matrices_make_the_same_equation_as_tall_ones() -> None:
    deltas = [some(60, 0.3, seed) for seed in range(3)]
    left, right = filled(deltas).sides
    weights = [1 / delta.square().sum() for delta in deltas]
    want = torch.stack([w * d.T @ d for w, d in zip(weights, deltas, strict=True)]).sum(0)
    assert torch.allclose(left, want, atol=1e-14)
    shown = torch.stack([w * d @ d.T @ d for w, d in zip(weights, deltas, strict=True)]).sum(0)
    assert torch.allclose(right, shown, atol=1e-14)
