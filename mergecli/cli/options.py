"""Arguments and options that several commands share, with the completion of their values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mergecli.runtime.errors import InputError, UsageError


def complete_methods(incomplete: str) -> list[str]:
    """Names of methods, for the shell."""
    from mergecli.methods import names

    return [name for name in names() if name.startswith(incomplete)]


def complete_tasks(incomplete: str) -> list[str]:
    """Names of tasks and sets of tasks, for the shell; after a comma, the next one."""
    from mergecli.data.tasks import names, sets

    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in (*names(), *sets()) if name.startswith(last)]


def complete_formats(incomplete: str) -> list[str]:
    """Formats of tables, for the shell."""
    from mergecli.results.tables import FORMATS

    return [name for name in FORMATS if name.startswith(incomplete)]


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one key of the recipe; the value is TOML. Repeatable."
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="FORMAT", autocompletion=complete_formats,
        help="table, tsv, csv, json, md, latex or html. Default: table on a terminal, tsv in a pipe.",
    ),
]  # fmt: skip
Base = Annotated[
    str | None, typer.Option("--base", metavar="SOURCE", help="The base model: hf:, ms:, toy: or a path.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only check everything and show what would be done; write nothing.")
]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw it: a .png, .svg or .pdf file.")]


def names(option: str, written: list[str] | None) -> tuple[str, ...]:
    """The names that an option was given, once or more, each time one or several with commas between them; none where it is
    not given.

    Raises:
        UsageError: it is given, and all of them are empty.
    """
    found = tuple(name.strip() for text in written or () for name in text.split(",") if name.strip())
    if written and not found:
        raise UsageError(f"{option}: is empty", "leave the option out for its default")
    return found


def is_recipe(arguments: list[str]) -> bool:
    """Whether the arguments are one recipe, and not models.

    Raises:
        InputError: there is one, a bare name that is neither, and so most likely meant as a recipe.
    """
    if len(arguments) != 1:
        return False
    path = Path(arguments[0])
    if not path.suffix and not set(arguments[0]) & set(":=#") and not os.path.exists(path):  # noqa: PTH110  a long name
        from mergecli.storage.store import nearest_path

        near = nearest_path(path)
        meant = f" (did you mean `{near}`?)" if near else ""
        raise InputError(f"{path}: no such file or recipe{meant}", "a recipe's name ends in `.toml`")
    return path.suffix == ".toml"
