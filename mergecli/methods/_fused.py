"""Queries, keys and values of a layer as one matrix, as open_clip keeps them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_PARTS = ("q_proj", "k_proj", "v_proj")
_QUERIES = re.compile(r"(?<![^.])q_proj\.weight$")


def stacks(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, members) of what is merged together, in the order of `shapes`: each tensor by itself, without members, but
    the weights of queries, keys and values of a layer at the place of the queries, if they are matrices of one shape."""
    found: dict[str, tuple[str, ...]] = {}
    for name, shape in shapes.items():
        members = tuple(_QUERIES.sub(f"{part}.weight", name) for part in _PARTS)
        if (
            len(set(members)) == len(_PARTS)
            and len(shape) == 2
            and all(shapes.get(each) == shape for each in members)
        ):
            found[name] = members
    stacked = {each for members in found.values() for each in members}
    for name in shapes:
        if name in found:
            yield _QUERIES.sub("qkv_proj.weight", name), found[name]
        elif name not in stacked:
            yield name, ()
