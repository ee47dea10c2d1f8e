"""`mergecli fetch`."""

from __future__ import annotations

from typing import Annotated

import typer

from mergecli.cli import options, show


def fetch(
    sources: Annotated[
        list[str], typer.Argument(metavar="RECIPE|SOURCE...", help="Recipes, or sources by name.")
    ],
    changes: options.Set = None,
) -> None:
    """Bring models to this machine; prints one local path a line. The only command that may use the network.

    mergecli fetch recipe.toml
    """
    from mergecli import fetching

    for path in fetching.fetch(sources, changes=changes or []):
        show.line(str(path))
