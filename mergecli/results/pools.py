"""Averages of two pools of models are not put under one heading."""

from __future__ import annotations

from collections.abc import Sequence

from mergecli.data.pools import pools
from mergecli.results.references import Reference
from mergecli.results.result import Evaluation
from mergecli.runtime.errors import UsageError, quoted


def several_pools(results: Sequence[Evaluation], reference: Reference | None = None) -> str:
    """What stands against one table of these results, beside a published one; empty if they are of one pool, as far as is known."""
    found: dict[str, list[str]] = {}
    for each in results:
        if each.pool:
            found.setdefault(each.pool, []).append(each.name)
    named = {pool: list(dict.fromkeys(names)) for pool, names in found.items()}
    if reference:
        named.setdefault(reference.pool, []).append(reference.name)
    if len(named) < 2:
        return ""
    each_pool = "; ".join(f"{_named(pool)}: {quoted(names, 3)}" for pool, names in named.items())
    return f"averages of models of different pools do not compare: {each_pool}"


def refuse_several_pools(results: Sequence[Evaluation], reference: Reference | None) -> None:
    """Raises UsageError if results, and a published table, are of several pools."""
    if text := several_pools(results, reference):
        hint = "make a table for each pool; a recipe says its own with `pool`"
        raise UsageError(text, hint)


def _named(pool: str) -> str:
    known = pools().get(pool)
    return f"`{pool}` ({known.what})" if known else f"`{pool}`"
