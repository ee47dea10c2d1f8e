"""Whether sources are on this machine, and the command that brings those that are not."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from mergecli.data.tasks import Task
from mergecli.hub.requirements import KINDS, named, of_recipe
from mergecli.recipe.lock import key_of
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError, listed
from mergecli.storage.sources import Source
from mergecli.storage.store import NotFetchedError, locate


def expect_all(
    sources: Iterable[Source | None], recipe: Recipe | None = None, tasks: Iterable[Task] = ()
) -> None:
    """Raises InputError with every source that is not on this machine, and the command that fetches them.

    Args:
        sources: models and their adapters.
        recipe: the recipe that was named, which `fetch` can be given whole.
        tasks: those whose data are needed.
    """
    every = {each: "" for source in sources if source for each in (source, source.adapter) if each}
    # toy images are drawn
    every |= {task.data: f" (task `{task.name}`)" for task in tasks if task.data.kind != "toy"}
    problems: dict[Source, InputError] = {}
    for source in every:
        try:
            locate(source)
        except InputError as error:
            problems[source] = error
    if not problems:
        return
    unfetched = [source for source, error in problems.items() if isinstance(error, NotFetchedError)]
    hints = [_command(unfetched, recipe)] if unfetched else []
    hints += [
        error.hint for error in problems.values() if error.hint and not isinstance(error, NotFetchedError)
    ]
    hint = "; ".join(list(dict.fromkeys(hints))[:2])
    lines = [
        error.message.replace(f"{source.name}:", f"{source.name}{every[source]}:", 1)
        for source, error in problems.items()
    ]
    if len(problems) == 1:
        raise InputError(lines[0], hint)
    what = "are not on this machine"
    if len(unfetched) == len(problems):
        what, lines = "have not been fetched", [named(source) + every[source] for source in unfetched]
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
