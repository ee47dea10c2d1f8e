"""Sizes as users write them."""

from __future__ import annotations

import re

from mergecli.runtime.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str, name: str, least: int = 0) -> int:
    """Bytes of a size such as `5GB`, `500MB` or `1000`.

    Args:
        name: what messages call it.

    Raises:
        UsageError: it is no size, or less than `least` bytes.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    size = float(found[1]) * _UNITS[found[2]] if found else -1.0
    if not least <= size < 1e18:
        raise UsageError(f"{name}: expected a size such as `500MB` or `20GB`, got `{text}`")
    return int(size)
