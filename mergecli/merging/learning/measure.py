"""`measure`: statistics of every model, measured on images and kept as files before any merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergecli import methods
from mergecli.merging.learning.statistics import Measurement, files_for
from mergecli.merging.models import open_models
from mergecli.methods._calibrated import Calibrated
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import UsageError, did_you_mean, quoted
from mergecli.storage.atomic import check_name, check_target, warn_of_others

if TYPE_CHECKING:
    from mergecli.runtime.progress import AnyProgress, shown


@dataclass(frozen=True)
class Measured:
    """The files of statistics."""

    paths: Mapping[str, Path]
    """Task -> its file; for a method that measures all tasks together, its name and their one file."""
    new: tuple[str, ...]
    """Names of those measured now, by any of several processes; the others existed already, and fit."""


def measure(
    recipe: str | Path | Recipe,
    *,
    output: str | Path,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    changes: Sequence[str] = (),
    only: Sequence[str] = (),
    device: str = "cpu",
    progress: AnyProgress | None = None,
) -> Measured:
    """Measures the statistics that a method needs of every model, for merges with `statistics=output`.

    There is a file for each task, so several processes or machines may measure different tasks at the same time; each
    needs only the base, and the models and images of its own tasks. Files that exist already are kept if they fit.
    Processes that `torchrun` starts share the tasks, and end when all are measured; the files have the bytes that one
    process would write. A method that measures all tasks together has one file, called after the method.

    Args:
        output: a folder.
        method: a method's name; replaces the recipe's.
        settings: the method's settings, with `method`.
        only: the tasks to measure; none stands for all.

    Raises:
        UsageError: the recipe is wrong, or its method measures nothing.
        InputError: models or images are missing; or a file in the folder was measured on something else.
    """
    recipe = recipe_of(recipe, method=method, settings=settings, changes=changes)
    chosen = recipe.built if recipe.method else None
    if not isinstance(chosen, Calibrated):
        known = [name for name in methods.names() if issubclass(methods.find(name), Calibrated)]
        what = f"`{recipe.method}` measures nothing" if recipe.method else "no method is named"
        raise UsageError(what, f"name one with `--method`: {quoted(known)}")
    target = Path(output)
    check_name(target, folder=True)
    for name in only:
        if name not in recipe.tuned:
            raise UsageError(f"the recipe has no model `{name}`{did_you_mean(name, recipe.tuned)}")
    if only and chosen.joint:
        raise UsageError(
            f"`{recipe.method}` cannot measure some tasks only: what goes into a layer comes out of the layers before "
            "it, merged of all tasks",
            "measure all tasks at once, or use a method that measures each task by itself",
        )
    if only:
        tuned = {name: source for name, source in recipe.tuned.items() if name in only}
        recipe = replace(recipe, tuned=tuned)
    with ExitStack() as stack:
        report = stack.enter_context(shown(progress))
        models = open_models(recipe, stack, needs="base", device=device)
        files = files_for(models, chosen, recipe, target)
        if not all(each.path.exists() for each in files):  # a folder that has them all may be read-only
            check_target(target, folder=True)
        warn_of_others(target, {each.path.name for each in files}, models.paths.values())
        new = Measurement.of(files, models, chosen, recipe).measure(report)
    return Measured({each.name: each.path for each in files}, new)
