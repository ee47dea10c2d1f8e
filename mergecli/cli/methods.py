"""`mergecli methods`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergecli.cli import console, ending, options
from mergecli.runtime.errors import toml_text

if TYPE_CHECKING:
    from mergecli.methods import Method
    from mergecli.results.tables import Table


def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", autocompletion=options.complete_methods, help="One method."),
    ] = None,
    form: options.Format = None,
) -> None:
    """List the merging methods, or show one: its equation, settings, cost and paper.

    mergecli methods ties
    """
    from mergecli import methods as registry
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    console.check_format(form)
    ending.did("listed the methods" if name is None else f"showed {name}")
    if name is None:
        classes = {each: registry.find(each) for each in registry.names()}
        rows = tuple((each, method.title, _reads(method.passes)) for each, method in classes.items())
        table = Table((Column("method"), Column("what it does"), Column("cost")), rows)
        console.table(table, form, drawn=_of_each_kind(classes))
        return
    described = _described(name)
    if form == "json":
        console.json(described)
        return
    console.prose(f"{name}: {described['title']}\n")
    console.prose(f"{described['equation']}\n")
    for setting in described["settings"]:
        default = "required" if setting["required"] else f"default {toml_text(setting['default'])}"
        console.prose(f"method.{setting['name']}  {setting['expected']}; {default}")
        console.prose(f"    {' '.join(setting['documentation'].split())}")
    console.prose(f"{chr(10) if described['settings'] else ''}kind   {described['kind']}")
    console.prose(f"cost   {described['cost']}")
    console.prose(f"paper  {described['paper']}")


def _of_each_kind(classes: Mapping[str, type[Method]]) -> list[Table]:
    """A table for each kind of method."""
    from mergecli import methods as registry
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    columns = (
        Column("method"),
        Column("what it does"),
        Column("needs", optional=True),
        Column("reads", "count", optional=True),
    )
    return [
        Table(
            columns,
            tuple(
                (name, each.title, ", ".join(each.needed()) or "-", each.passes)
                for name, each in classes.items()
                if each.kind == kind
            ),
            title=f"{kind}: {needs}",
        )
        for kind, needs in registry.KINDS.items()
    ]


def _described(name: str) -> dict[str, Any]:
    from mergecli import methods as registry

    method = registry.find(name)
    settings: list[dict[str, Any]] = [
        {"name": each.name, "expected": each.expected, "required": each.required,
         "default": None if each.required else _plain(each.default), "documentation": each.documentation}
        for each in registry.settings(name).values()
    ]  # fmt: skip
    return {
        "name": name,
        "title": method.title,
        "kind": method.kind,
        "equation": inspect.getdoc(method),
        "settings": settings,
        "cost": "; ".join(
            part
            for part in (
                _reads(method.passes),
                method.work,
                method.looks_at,
                "needs a base" if method.needs_base else "needs no base",
            )
            if part
        ),
        "paper": method.paper,
    }


def _plain(default: object) -> object:
    """A default as a recipe has it: another method is the table of its settings."""
    from mergecli import methods as registry

    if isinstance(default, registry.Method):
        return {"name": registry.name_of(default), **registry.table_of(default)}
    return default


def _reads(passes: int) -> str:
    return "reads every model once" if passes == 1 else f"reads every model {passes} times"
