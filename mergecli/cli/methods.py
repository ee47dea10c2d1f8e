"""`mergecli methods`."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any

import typer

from mergecli.cli import options
from mergecli.cli import output as show
from mergecli.runtime.errors import shown


def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", autocompletion=options.complete_methods, help="One method."),
    ] = None,
    form: options.Format = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """List the merging methods, or show one: its equation, settings, cost and paper.

    mergecli methods ties
    """
    from mergecli import methods as registry
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    show.check_format(form)
    if name is None:
        classes = {each: registry.find(each) for each in registry.names()}
        rows = tuple((each, method.title, _reads(method.passes)) for each, method in classes.items())
        table = Table((Column("method"), Column("what it does"), Column("cost")), rows)
        show.table(table, "json" if as_json else form)
        return
    described = _described(name)
    if as_json or form == "json":
        show.line(json.dumps(described, indent=2))
        return
    show.line(f"{name}: {described['title']}\n")
    show.line(f"{described['equation']}\n")
    for setting in described["settings"]:
        default = "required" if setting["required"] else f"default {_written(setting['default'])}"
        show.line(f"method.{setting['name']}  {setting['expected']}; {default}")
        show.line(f"    {' '.join(setting['documentation'].split())}")
    show.line(f"{chr(10) if described['settings'] else ''}cost   {described['cost']}")
    show.line(f"paper  {described['paper']}")


def _described(name: str) -> dict[str, Any]:
    from mergecli import methods as registry

    method = registry.find(name)
    settings: list[dict[str, Any]] = [
        {"name": each.name, "expected": each.expected, "required": each.required,
         "default": None if each.required else each.default, "documentation": each.documentation}
        for each in registry.settings(name).values()
    ]  # fmt: skip
    return {
        "name": name,
        "title": method.title,
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


def _written(default: object) -> str:
    """A default as TOML; other methods as tables."""
    from mergecli import methods as registry

    if isinstance(default, registry.Method):
        return shown({"name": registry.name_of(default), **registry.table_of(default)})
    return shown(default)


def _reads(passes: int) -> str:
    return "reads every model once" if passes == 1 else f"reads every model {passes} times"
