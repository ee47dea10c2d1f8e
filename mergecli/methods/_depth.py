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


def parts_of(names: Iterable[str]) -> dict[str, str]:
    """Name -> part of the network: a layer's number, or what comes `before` or `after` all layers. Parts follow each other as
    in the network."""
    order = {"before": "", "after": "~"}
    parts: dict[str, str] = {}
    for name, depth in depths(names).items():
        layer = layer_of(name)
        parts[name] = str(layer) if layer is not None else "before" if depth == 0 else "after"
    return dict(sorted(parts.items(), key=lambda item: order.get(item[1], item[1].zfill(6))))


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
