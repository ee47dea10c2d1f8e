"""The k-th largest magnitude of whole task vectors, found in one pass."""

from __future__ import annotations

import pytest
import torch

from mergecli.methods._kth_largest import keep_largest
from tests.conftest import World, assert_same
from tests.methods.reference.ties import ties
from tests.support.merging import merged, with_integers, with_models


def test_the_threshold_is_exact_although_the_sample_misleads(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of very different scales, and a bracket far too narrow for the sample: it must be widened."""
    monkeypatch.setattr("mergecli.methods._kth_largest.MARGIN", 1e-6)
    tuned = [
        {k: (v + (10.0**i) * (v - world.base[k])) if v.is_floating_point() else v for k, v in model.items()}
        for i, model in enumerate(world.tuned.values())
    ]
    other = with_models(world, world.base, *tuned)
    want = ties(world.base, tuned, 0.3, 0.2, "sum")
    assert_same(merged(other, "ties"), with_integers(want, world), atol=1e-5)


def test_entries_below_their_tasks_threshold_become_zero() -> None:
    deltas = torch.tensor([[1.0, -2, 3], [1, -2, 3]])
    assert keep_largest(deltas, torch.tensor([2.0, torch.inf])).tolist() == [[0, -2, 3], [0, 0, 0]]
