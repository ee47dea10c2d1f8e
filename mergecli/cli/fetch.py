"""`mergecli fetch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mergecli.cli import amounts, console, ending, options

if TYPE_CHECKING:
    from mergecli.hub.fetch import Fetched


def fetch(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|SOURCE...", help="Recipes, or sources: hf:org/model, hf:datasets/org/name, ms:..."
        ),
    ],
    into: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The store, instead of MERGECLI_HOME or the cache folder."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="KINDS", help="models, data, or models,data. Repeatable.")
    ] = None,
    locked: Annotated[bool, typer.Option("--locked", help="Exactly what the recipe's lock says.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use no network; list what is not in the store.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Only read the store's files again; name each damaged or missing one."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be fetched; write nothing.")
    ] = False,
    platform: Annotated[
        str | None,
        typer.Option(metavar="hf|ms", help="Where to fetch hf: sources from: Hugging Face or ModelScope."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", metavar="N", help="Files at a time.")] = 4,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Convert pickled weights where there are no others.")
    ] = False,
    token_to_endpoint: Annotated[
        bool,
        typer.Option(
            "--token-to-endpoint", help="Send the token to an HF_ENDPOINT that is not the hub itself, too."
        ),
    ] = False,
    changes: options.Set = None,
) -> None:
    """Bring models and data to this machine; prints one local path a line. It and push alone reach the internet.

    Beside each recipe it writes a lock (recipe.lock) with commits, sizes and SHA-256; --locked fetches exactly these.
    Ctrl-C loses nothing that has arrived: the same command resumes.

    mergecli fetch recipe.toml
    """
    from mergecli.hub.fetch import LockNotWrittenError, fetch

    with console.progress() as progress:
        try:
            done = fetch(
                sources, into=into, only=[kind.strip() for kinds in only or [] for kind in kinds.split(",")],
                locked=locked, offline=offline, verify=verify, dry_run=dry_run, platform=platform, jobs=jobs,
                allow_pickle=allow_pickle, token_to_endpoint=token_to_endpoint, changes=changes or [],
                progress=progress, note=console.note,
            )  # fmt: skip
        except LockNotWrittenError as error:
            for path in error.done.paths:
                console.path(path)
            raise
    if dry_run:
        _show_plan(done)
        return
    if verify:
        ending.did(f"verified {amounts.count(len(done.paths), 'source')}")
    else:
        ending.did(f"fetched {_sum(done)}" if done.downloads else "nothing was missing")
    ending.wrote(*done.locks)
    for path in done.paths:
        console.path(path)


def _show_plan(done: Fetched) -> None:
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    columns = (Column("source"), Column("file"), Column("bytes", "count"), Column("host"))
    rows = tuple((each.source, each.path, each.size, each.host) for each in done.downloads)
    console.table(Table(columns, rows), None)
    ending.did(f"would fetch {_sum(done)}" if rows else "nothing is missing")


def _sum(done: Fetched) -> str:
    hosts = " and ".join(sorted({each.host for each in done.downloads}))
    sizes = [each.size for each in done.downloads if each.size is not None]
    unknown = len(done.downloads) - len(sizes)
    known = f"{_counted(len(sizes), 'file')}, {sum(sizes):,} bytes, from {hosts}"
    if not unknown:
        return known
    more = _counted(unknown, "more source" if sizes else "source")
    start = f"{known}; and {more}" if sizes else f"{more} from {hosts}"
    return f"{start}, whose files only the hub knows"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"
