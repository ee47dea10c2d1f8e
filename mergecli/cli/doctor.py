"""`mergecli doctor`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from mergecli.cli import amounts, console, ending
from mergecli.runtime.errors import HubError, InputError

_BYTES = ("bytes", "memory", "free", "may_grow_to")


def doctor(
    online: Annotated[
        bool, typer.Option("--online", help="Also ask both hubs whether they can be reached.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Show what mergecli runs on and keeps, and whether it is well: one paste for a bug report.

    Versions, devices and threads; sizes of the store and the cache, and the digests of a sample of their files; free
    space. No token, no value of a variable and no user's name is shown. Status 3 says that something is damaged, that a
    library is missing, or that nothing can be kept in the cache; with --online status 4, that a hub cannot be reached.

    mergecli doctor

    mergecli doctor --online --json
    """
    from dataclasses import asdict

    from mergecli.hub.doctor import doctor
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    with console.progress() as progress:
        found = doctor(online=online, progress=progress)
    compared = sum(each["sample"]["compared"] for each in (found.store, found.cache))
    ending.did(f"compared the digests of {amounts.count(compared, 'file')}")
    wrong = (*found.damaged, *found.problems)
    silent = [hub for hub, about in found.hubs.items() if about["seconds"] is None]
    if as_json:
        console.json(asdict(found))
    else:
        sections = {
            name: [*_lines(getattr(found, name))]
            for name in ("versions", "machine", "store", "cache", "hubs")
        }
        sections["environment"] = [
            ("variables", ", ".join(found.variables) or "none of those that change anything")
        ]
        sections["what is wrong"] = [_wrong(each) for each in wrong]
        tables = [
            Table((Column(""), Column("")), tuple(each), title=name)
            for name, each in sections.items()
            if each
        ]
        console.table(tables[0], "table", tables)
    if wrong:
        cure = "`mergecli cache KIND --clear` removes what can be made again; a damaged fetched folder is deleted, and fetched again"
        count = f"{len(wrong)} {'thing is' if len(wrong) == 1 else 'things are'}"
        raise InputError(f"{count} not as it should be", cure if found.damaged else "")
    if silent:
        raise HubError(
            f"{' and '.join(silent)} cannot be reached",
            "check the network, and the proxy and certificate variables",
        )


def _wrong(text: str) -> tuple[str, str]:
    """A file, and what is wrong with it; or what else is wrong."""
    file, colon, what = text.partition(": ")
    return (file, what) if colon else (what, "")


def _lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and value of every fact, for people."""
    for name, value in facts.items():
        words = name.replace("_", " ")
        if isinstance(value, Mapping):
            known = {part: each for part, each in value.items() if each is not None}
            yield (
                words,
                ", ".join(
                    f"{_text(part, each)} {part}" if isinstance(each, int | float) else each
                    for part, each in known.items()
                ),
            )
        elif isinstance(value, list):
            yield words, "; ".join(value) or "none"
        else:
            yield words, _text(name, value) + (" bytes" if value is not None and name in _BYTES else "")


def _text(name: str, value: object) -> str:
    if value is None:
        return "not known" if name in _BYTES else "not installed"
    return f"{value:,}" if isinstance(value, int) else str(value)
