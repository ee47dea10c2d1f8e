"""Licenses of models, as their cards name them, and which of several has the terms of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from mergecli.results.card_file import CARD, CardFile
from mergecli.runtime.errors import MergecliError
from mergecli.storage.sources import HUBS, Source
from mergecli.storage.store import locate, manifest_of

_TERMS: dict[str, str] = {
    **dict.fromkeys(
        ("cc0-1.0", "unlicense", "wtfpl", "0bsd", "pddl", "mit", "isc", "zlib", "bsl-1.0", "ms-pl", "ncsa", "bsd",
         "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "postgresql", "afl-3.0", "ecl-2.0", "artistic-2.0",
         "apache-2.0", "odc-by", "cdla-permissive-1.0", "cdla-permissive-2.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0",
         "cc-by-4.0"), "",
    ),
    "lgpl": "lgpl", "lgpl-lr": "lgpl", "lgpl-2.1": "lgpl", "lgpl-3.0": "lgpl", "mpl-2.0": "mpl", "epl-1.0": "epl",
    "epl-2.0": "epl", "eupl-1.1": "eupl", "eupl-1.2": "eupl", "osl-3.0": "osl", "ms-rl": "ms-rl",
    "gpl": "lgpl gpl", "gpl-2.0": "lgpl gpl", "gpl-3.0": "lgpl gpl", "agpl-3.0": "lgpl gpl network",
    "cc-by-sa-3.0": "share-alike", "cc-by-sa-4.0": "share-alike", "odbl": "odbl", "gfdl": "gfdl",
    "openrail": "use", "openrail++": "use", "creativeml-openrail-m": "use", "bigscience-openrail-m": "use",
    "bigscience-bloom-rail-1.0": "use", "bigcode-openrail-m": "use",
    "cc-by-nc-2.0": "non-commercial", "cc-by-nc-3.0": "non-commercial", "cc-by-nc-4.0": "non-commercial",
    "cc-by-nc-sa-2.0": "non-commercial non-commercial-share-alike",
    "cc-by-nc-sa-3.0": "non-commercial non-commercial-share-alike",
    "cc-by-nc-sa-4.0": "non-commercial non-commercial-share-alike",
    "cc-by-nd-4.0": "unchanged", "cc-by-nc-nd-3.0": "non-commercial unchanged",
    "cc-by-nc-nd-4.0": "non-commercial unchanged",
}  # fmt: skip
"""The hubs' name of a license -> what it demands beyond a notice; of two with the same terms, the later is the stricter."""

TOY = "apache-2.0"
"""The toys are part of this program."""


def licenses(sources: Iterable[Source]) -> dict[str, str | None]:
    """Label -> license of each source and adapter, as its card or the store's copy of it says; None where none does."""
    every = [part for each in sources for part in (each, each.adapter) if part]
    return {each.label: TOY if each.kind == "toy" else _license_at(each) for each in every}


def _license_at(source: Source) -> str | None:
    """The license that a hub gave when the model was fetched, or that is in the card of its folder."""
    try:
        path = locate(source if source.kind == "path" else replace(source, inside=None))
        if source.kind in HUBS and (recorded := manifest_of(path).license):
            return recorded
        if not path.is_dir():
            if not path.name.startswith(
                "model."
            ):  # a card beside any other file may be that of something else
                return None
            path = path.parent
        found = CardFile.read(path / CARD).front.get("license")
    except MergecliError:
        return None
    return found.strip() or None if isinstance(found, str) else None


def strictest(known: Mapping[str, str | None]) -> tuple[str | None, str]:
    """The license that has the terms of all, if one of them has; and a sentence that says why it is that, or why none."""
    if missing := [name for name, license in known.items() if license is None]:
        return None, f"No license is given here, since that of {_listed(missing)} is not known."
    named = sorted({license for license in known.values() if license})
    if len(named) == 1:
        return named[0], f"`{named[0]}` is the license of every model that was merged."
    if strange := [license for license in named if license.lower() not in _TERMS]:
        return None, f"No license is given here, since the terms of {_listed(strange)} cannot be compared."
    order = list(_TERMS)
    terms = {license: set(_TERMS[license.lower()].split()) for license in named}
    fits = [each for each in named if terms[each] >= set().union(*terms.values())]
    if not fits:
        return None, f"No license is given here, since none of {_listed(named)} has the terms of the others."
    chosen = max(fits, key=lambda license: order.index(license.lower()))
    others = [each for each in named if each != chosen]
    return chosen, f"`{chosen}` is the strictest of the models' licenses; the others are {_listed(others)}."


def forbids_changes(license: str) -> bool:
    """Whether the license allows no changed copies, which a merge is."""
    return "unchanged" in _TERMS.get(license.lower(), "").split()


def _listed(names: Iterable[str]) -> str:
    every = [f"`{name}`" for name in names]
    shown = every[:8] + ([f"{len(every) - 8} more"] if len(every) > 8 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
