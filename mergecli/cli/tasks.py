"""`mergecli tasks`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergecli.cli import console, ending, options
from mergecli.runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergecli.data.overview import SplitFound
    from mergecli.data.tasks import Task
    from mergecli.results.tables import Table


def tasks(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", autocompletion=options.complete_tasks, help="One task or set."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", help="Look at the data that this recipe names, and show what is found in them."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            help="With --recipe: draw some images of each class under its name, a .png or .pdf file.",
        ),
    ] = None,
    form: options.Format = None,
) -> None:
    """List the built-in tasks, or show one: its data, class names and prompts. A set's name lists its tasks.

    With --recipe, the data are looked at: images of each split and class, the name in the data beside the name in the
    prompts, and what is left out.

    mergecli tasks eurosat

    mergecli tasks birds --recipe recipe.toml --plot birds.png
    """
    from mergecli.data import tasks as registry

    console.check_format(form)
    if recipe is None and plot is not None:
        raise UsageError("--plot: there are no images to draw", "name a recipe with `--recipe`")
    if recipe is not None and name is None:
        raise UsageError(
            "--recipe: of which task?", "`mergecli tasks NAME --recipe RECIPE` looks at the data of one"
        )
    ending.did("listed the tasks" if name is None else f"showed {name}")
    known = {} if recipe is not None else registry.sets()
    if name is None or name in known:
        table = _listed(registry.names() if name is None else known[name])
        groups = registry.listed() if name is None else {}
        drawn = [replace(_listed(tasks), title=title) for title, tasks in groups.items()]
        console.table(table, form, drawn)
        return
    from mergecli.recipe.reading import recipe_of

    task = registry.find(name, recipe_of(recipe) if recipe is not None else None)
    found: Sequence[SplitFound] = ()
    if recipe is not None:
        from mergecli.data import overview

        if plot is not None:
            overview.contact_sheet(task, plot)
        found = overview.found_for(task)
    described: dict[str, object] = {
        "name": task.name, "description": task.description, "data": str(task.data), "config": task.config,
        "split": task.split, "train_split": task.train_split, "classes": task.classes, "templates": task.templates,
    }  # fmt: skip
    note = registry.published_note(task.name) if task.match != "position" else ""
    if note:
        described["note"] = note
    if recipe is not None:
        described["found"] = [asdict(each) for each in found]
    if form == "json":
        console.json(described)
        return
    _show(task, note, with_classes=recipe is None)
    for each in found:
        _show_split(each)


def _listed(names: Sequence[str]) -> Table:
    """A row for each task."""
    from mergecli.data import tasks as registry
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    columns = (Column("task"), Column("classes", "count", optional=True), Column("prompts", "count", optional=True),
               Column("data", optional=True), Column("what it is"))  # fmt: skip
    rows = tuple(
        (each.name, len(each.classes or ()), len(each.templates), str(each.data), each.description)
        for each in map(registry.find, names)
    )
    return Table(columns, rows)


def _show(task: Task, note: str, *, with_classes: bool) -> None:
    console.prose(f"{task.name}: {task.description}\n")
    console.prose(f"data     {task.data}" + (f" ({task.config})" if task.config else ""))
    console.prose(f"splits   {task.split} (evaluated), {task.train_split} (training)")
    console.prose(f"prompts  {task.templates[0]}")
    for template in task.templates[1:]:
        console.prose(f"         {template}")
    for number, each in enumerate((task.classes or ()) if with_classes else ()):
        console.prose(f"{'classes' if number == 0 else '':8} {number:>3}  {each}")
    if note:
        console.prose(f"names    {note}")


def _show_split(found: SplitFound) -> None:
    if found.problem:
        console.prose(f"\nsplit `{found.split}`: cannot be used: {found.problem}")
        return
    console.prose(
        f"\nsplit `{found.split}`: {found.images:,} images, {len(found.classes):,} classes ({found.matched})"
    )
    if found.left_out:
        console.prose(f"left out {found.left_out}")
    rows = [("label", "images", "in the data", "in the prompts")]
    rows += [
        (str(each.label), f"{each.images:,}", " + ".join(each.data_names) or "-", each.name)
        for each in found.classes
    ]
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    for label, images, own, name in rows:
        console.prose(f"  {label:>{wide[0]}}  {images:>{wide[1]}}  {own:{wide[2]}}  {name}".rstrip())
