"""`mergecli tasks`."""

from __future__ import annotations

from typing import Annotated

import typer

from mergecli.cli import console, options


def tasks(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", autocompletion=options.complete_tasks, help="One task or set."),
    ] = None,
    form: options.Format = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """List the built-in tasks, or show one: its data, class names and prompts. A set's name lists its tasks.

    mergecli tasks eurosat
    """
    from mergecli.data import tasks as registry
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    console.check_format(form)
    known = registry.sets()
    if name is None or name in known:
        chosen = [registry.find(each) for each in (registry.names() if name is None else known[name])]
        columns = (Column("task"), Column("classes", "count"), Column("prompts", "count"), Column("data"),
                   Column("what it is"))  # fmt: skip
        rows = tuple(
            (each.name, len(each.classes or ()), len(each.templates), str(each.data), each.description)
            for each in chosen
        )
        console.table(Table(columns, rows), "json" if as_json else form)
        return
    task = registry.find(name)
    described = {
        "name": task.name, "description": task.description, "data": str(task.data), "config": task.config,
        "split": task.split, "train_split": task.train_split, "classes": task.classes, "templates": task.templates,
    }  # fmt: skip
    if as_json or form == "json":
        console.json(described)
        return
    console.line(f"{task.name}: {task.description}\n")
    console.line(f"data     {task.data}" + (f" ({task.config})" if task.config else ""))
    console.line(f"splits   {task.split} (evaluated), {task.train_split} (training)")
    console.line(f"prompts  {task.templates[0]}")
    for template in task.templates[1:]:
        console.line(f"         {template}")
    for number, each in enumerate(task.classes or ()):
        console.line(f"{'classes' if number == 0 else '':8} {number:>3}  {each}")
