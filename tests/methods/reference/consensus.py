"""The summed task vector where enough TALL masks agree."""

from __future__ import annotations

from collections.abc import Sequence

from tests.methods.reference._tall_masks import tall_masks
from tests.methods.reference._weights import Weights, flat, unflat


def consensus(
    base: Weights, tuned: Sequence[Weights], scaling_factor: float, agreeing_tasks: int, mask_threshold: float
) -> Weights:
    masks, summed = tall_masks(base, tuned, mask_threshold)
    return unflat(flat(base) + scaling_factor * (masks.sum(0) >= agreeing_tasks) * summed, base)
