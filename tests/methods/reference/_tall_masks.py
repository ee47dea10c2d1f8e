"""TALL masks of whole task vectors (Wang et al., arXiv 2405.07813)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.reference._weights import Weights, flat


def tall_masks(base: Weights, tuned: Sequence[Weights], mask_threshold: float) -> tuple[Tensor, Tensor]:
    """(T, D) masks and (D,) the summed task vector."""
    deltas = torch.stack([flat(model) - flat(base) for model in tuned])
    summed = deltas.sum(0)
    return deltas.abs() > mask_threshold * (summed - deltas).abs(), summed
