"""`mergecli cache`."""

from __future__ import annotations

from typing import Annotated

import typer

from mergecli.cli import amounts, console, ending, options


def _complete_kinds(incomplete: str) -> list[str]:
    from mergecli.storage.cache import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]


def cache(
    kinds: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KIND...]", autocompletion=_complete_kinds, show_default=False,
            help="pixels, heads, results, digests, statistics, coefficients or experts. Default: all; of --clear the first four.",
        ),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove these kinds.")] = False,
    max_size: Annotated[
        str | None,
        typer.Option("--max-size", metavar="SIZE", help="Remove the least recently used, until SIZE is left, such as 5GB."),
    ] = None,
    form: options.Format = None,
) -> None:  # fmt: skip
    """Show the cache of evaluations and merges, or remove it.

    Images, heads and results are in `$MERGECLI_HOME/cache`. They grow to 20 GB, or to half of the free disk space if
    that is less. `MERGECLI_CACHE_SIZE` and `--cache-size` of `eval` change this limit. `statistics`, `coefficients` and
    `experts` of merges stay until you remove them by name. Everything here can be made again.

    mergecli cache

    mergecli cache pixels --clear

    mergecli cache statistics coefficients --clear
    """
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table
    from mergecli.storage.cache import cache

    console.check_format(form)
    found = cache(kinds or [], clear=clear, max_size=max_size)
    if found.removed:
        removed, size = len(found.removed), sum(each.size for each in found.removed)
        ending.did(f"removed {size / 1e6:,.1f} MB in {removed:,} {'entry' if removed == 1 else 'entries'}")
    else:
        ending.did(f"looked at {amounts.count(len(found.entries), 'cached file')}")
    columns = (Column("kind"), Column("what"), Column("bytes", "count"), Column("last used"))
    rows = tuple((each.kind, each.what, each.size, each.last_used) for each in found.entries)
    console.table(Table(columns, rows), form)
