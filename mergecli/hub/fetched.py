"""Whether sources are on this machine, and the command that brings those that are not."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from mergecli.hub.requirements import KINDS, named, of_recipe
from mergecli.recipe.lock import key_of
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError, listed
from mergecli.storage.sources import Source
from mergecli.storage.store import NotFetchedError, locate


def expect_all(sources: Iterable[Source | None], recipe: Recipe | None = None) -> None:
    """Raises InputError with every source that is not on this machine, and the command that fetches them.

    Args:
        recipe: the recipe that was named, which `fetch` can be given whole.
    """
    whole = [each for source in sources if source for each in (source, source.adapter) if each]
    every = {each for each in whole if not (each.kind == "toy" and each.is_data)}  # toy images are drawn
    problems: list[InputError] = []
    for source in sorted(every, key=lambda each: (each.is_data, str(each))):
        try:
            locate(source)
        except InputError as error:
            problems.append(error)
    if not problems:
        return
    unfetched = [error.source for error in problems if isinstance(error, NotFetchedError)]
    hints = [_command(unfetched, recipe)] if unfetched else []
    hints += [error.hint for error in problems if error.hint and not isinstance(error, NotFetchedError)]
    hint = "; ".join(list(dict.fromkeys(hints))[:2])
    if len(problems) == 1:
        raise InputError(problems[0].message, hint)
    what, lines = "are not on this machine", [error.message for error in problems]
    if len(unfetched) == len(problems):
        what, lines = "have not been fetched", [named(source) for source in unfetched]
    raise InputError(f"{len(lines)} of {len(every)} sources {what}:\n{listed(lines, 40)}", hint)


def _command(sources: Sequence[Source], recipe: Recipe | None) -> str:
    """The command that fetches the sources: those that the recipe's file names are fetched with it."""
    path = recipe.path if recipe else None
    known = {each.key for each in of_recipe(recipe_of(path), KINDS)} if path else set()
    own = [each for each in sources if key_of(each) in known]
    words = ["--locked"] if own and all(each.pinned for each in own) else []
    words += [str(path)] if own else []
    words += [named(each) for each in sources if each not in own]
    return f"`mergecli fetch {shlex.join(words)}` brings what is missing; it needs a network"
