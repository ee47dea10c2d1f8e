"""The normal equation's solutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergecli.methods._normal_equation import MARGIN, NormalEquation, largest_eigenvalue


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
