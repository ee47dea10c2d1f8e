"""How deep in the network a tensor lies, read from its name."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBERED = re.compile(r"(?:^|\.)(?:layers?|blocks?|resblocks|h)\.(\d+)(?:\.|$)")
_LAST = re.compile(
    r"post_?l|ln_post|ln_final|final|head|classifier|(^|\.)(visual_|text_)?proj|(^|\.)(layer)?norm\.|logit"
)


def layer_of(name: str) -> int | None:
    """The number of the transformer layer that the tensor belongs to, from 0, or None outside of all layers."""
    found = _NUMBERED.search(name)
    return int(found.group(1)) if found else None


def depths(names: Iterable[str]) -> dict[str, float]:
    """Name -> depth from 0, the first layer, to 1, the last.

    What comes before the layers (embeddings, their norm, and whatever cannot be told) counts as the first, what comes
    after them (post-layernorm, projection, head) as the last. Without a second layer all layers are the first.
    """
    layers = {name: layer_of(name) for name in names}
    numbers = [number for number in layers.values() if number is not None]
    last = max(numbers, default=0)

    def depth(name: str, number: int | None) -> float:
        if number is None:
            return 1.0 if _LAST.search(name) else 0.0
        return number / last if last else 0.0

    return {name: depth(name, number) for name, number in layers.items()}
