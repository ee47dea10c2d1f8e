"""`fetch`: sources to local paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergecli.catalogue import read_recipe
from mergecli.errors import HubError
from mergecli.recipe import Recipe
from mergecli.sources import HUBS, Source, locate, parse_source


def fetch(
    sources: str | Path | Recipe | Sequence[str | Path], *, changes: Sequence[str] = ()
) -> tuple[Path, ...]:
    """The local path of everything that the recipes and sources name, in order and without repetition.

    Raises:
        HubError: something of a hub is not in the store.
    """
    given = [sources] if isinstance(sources, str | Path | Recipe) else list(sources)
    wanted: dict[str, Source] = {}
    for each in given:
        if isinstance(each, Recipe) or Path(each).suffix == ".toml":
            recipe = each if isinstance(each, Recipe) else read_recipe(each, changes)
            found = [*([recipe.base] if recipe.base else []), *recipe.tuned.values()]
            found += [
                table.data for table in recipe.tasks.values() if table.data and table.data.kind != "toy"
            ]
        else:
            found = [parse_source(str(each), Path())]
        wanted.update({str(source): source for source in found})
    return tuple(_local(source) for source in wanted.values())


def _local(source: Source) -> Path:
    if source.kind not in HUBS:
        return locate(source)
    try:
        return locate(source)
    except Exception as error:
        raise HubError(
            f"{source}: is not in the store, and this version cannot download from {HUBS[source.kind]} yet",
            "download the repository with the hub's own tool and name the folder instead",
        ) from error
