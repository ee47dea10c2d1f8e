"""`mergecli methods`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergecli.cli import console, ending, options
from mergecli.runtime.errors import UsageError, toml_text

if TYPE_CHECKING:
    from mergecli.methods import Method
    from mergecli.results.tables import Table


def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", autocompletion=options.complete_methods, help="One method."),
    ] = None,
    recommend: Annotated[
        str | None,
        typer.Option(
            "--recommend",
            metavar="RECIPE",
            help="Show three methods to try with the recipe's models and images.",
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            "--images",
            metavar="none|unlabeled",
            help="Of --recommend: what images there are, whatever is found.",
        ),
    ] = None,
    may_grow: Annotated[
        bool,
        typer.Option("--may-grow", help="Of --recommend: also methods whose file is larger than one model."),
    ] = False,
    form: options.Format = None,
) -> None:
    """List the merging methods, or show one: its equation, settings, cost and paper.

    mergecli methods ties

    mergecli methods --recommend recipes/toy.toml --may-grow
    """
    from mergecli import methods as registry
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    console.check_format(form)
    if recommend is not None:
        if name is not None:
            raise UsageError(f"--recommend: it takes no method, got `{name}`")
        _recommend(recommend, images, may_grow, form)
        return
    if images is not None or may_grow:
        raise UsageError("--images and --may-grow are options of --recommend", "add `--recommend RECIPE`")
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
    console.prose(f"layers {described['layers']}")
    console.prose(f"paper  {described['paper']}")


def _recommend(recipe: str, images: str | None, may_grow: bool, form: str | None) -> None:
    """Prints the methods to try with a recipe, each with the options of `merge` that choose it."""
    from mergecli.merging.recommend import IMAGES, recommend
    from mergecli.results.cells import Column
    from mergecli.results.tables import Table

    if images is not None and images not in IMAGES:
        raise UsageError(f"--images: expected {' or '.join(f'`{each}`' for each in IMAGES)}, got `{images}`")
    found = recommend(
        recipe, images="unlabeled" if images == "unlabeled" else "none" if images else None, may_grow=may_grow
    )
    console.note(
        f"{found.tasks} models, {found.adapters} of them adapters; {found.with_images} tasks have images here; "
        f"images reckoned with: {found.images}; "
        + ("the file may grow" if may_grow else "one model is wanted")
    )
    ending.did(f"looked at {recipe}")
    if form is not None:
        rows = tuple((each.options, each.why, each.cost) for each in found.suggestions)
        console.table(Table((Column("options of merge"), Column("why"), Column("cost")), rows), form)
        return
    for number, each in enumerate(found.suggestions, 1):
        console.prose(f"{number}. {each.options}")
        console.prose(f"    why   {each.why}")
        console.prose(f"    cost  {each.cost}")


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
         "default": None if each.required else _plain(each.default), "documentation": each.documentation,
         "by_layer": each.name in registry.may_differ(method)}
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
        "layers": registry.about_layers(method),
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
