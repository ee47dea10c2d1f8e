"""One task's TALL mask on the summed task vector."""

from __future__ import annotations

from collections.abc import Sequence

from tests.methods.reference._tall_masks import tall_masks
from tests.methods.reference._weights import Weights, flat, unflat


def tall_mask(base: Weights, tuned: Sequence[Weights], task: int, mask_threshold: float) -> Weights:
    masks, summed = tall_masks(base, tuned, mask_threshold)
    return unflat(flat(base) + masks[task] * summed, base)
