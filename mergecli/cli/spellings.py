"""One language of options: other ways to say the same are rewritten before the arguments are parsed.

A recipe may be an argument or `--recipe FILE`, and `--json` is `--format json`, in every command that has one of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mergecli.cli import console
from mergecli.runtime.errors import UsageError

OLD: dict[str, dict[str, str]] = {
    "eval": {"--tasks": "--task", "--only": "--model", "--dtype": "--precision"},
    "measure": {"--only": "--task"},
}
"""Command -> option of version 0.1 -> what it is called now. They work for one more version."""


def takes_recipe(parameters: Sequence[Any]) -> bool:
    """Whether one of the arguments may be a recipe."""
    return any(each.param_type_name == "argument" and "RECIPE" in (each.metavar or "") for each in parameters)


def rewritten(command: str, parameters: Sequence[Any], arguments: Sequence[str], *, say: bool) -> list[str]:
    """The arguments in today's words; `say` notes the old ones.

    Raises:
        UsageError: two recipes are named where one is expected.
    """
    options = {
        name: each for each in parameters if each.param_type_name == "option" for name in (*each.opts, *each.secondary_opts)
    }  # fmt: skip
    old, given = OLD.get(command, {}), iter(arguments)
    recipe_is_argument = takes_recipe(parameters)
    recipe_is_option = not recipe_is_argument and "--recipe" in options and not options["--recipe"].is_flag
    found: list[str] = []
    recipes: list[str] = []
    for argument in given:
        if argument == "--":
            return [*found, argument, *given]
        if not argument.startswith("-") or argument == "-":
            if recipe_is_option and argument.endswith(".toml"):
                recipes.append(argument)
            else:
                found.append(argument)
            continue
        name, equals, value = argument.partition("=") if argument.startswith("--") else (argument, "", "")
        if name in old:
            if say:
                console.note(
                    f"`{name}` is called `{old[name]}` now, and will not be understood by a later version"
                )
            name = old[name]
        if name == "--json" and "--format" in options:
            found.append("--format=json")
            continue
        if name == "--recipe" and (recipe_is_argument or recipe_is_option):
            text = value if equals else next(given, None)
            if text is not None:
                recipes.append(text)
                continue
        if name == "--format" and "--format" not in options and "--json" in options:
            text = value if equals else next(given, "")
            found += ["--json"] if text == "json" else [name, text]
            continue
        found.append(name + equals + value)
        found += _value(options.get(name), equals, given)
    if recipe_is_argument:
        return _with_arguments(found, recipes)
    if len(set(recipes)) > 1:
        raise UsageError(
            f"--recipe: expected one recipe, got {' and '.join(f'`{each}`' for each in recipes)}"
        )
    return [*(["--recipe", recipes[0]] if recipes else []), *found]


def _value(option: Any, equals: str, given: Iterator[str]) -> list[str]:
    """The argument that is this option's value, if it has one there."""
    if option is None or option.is_flag or equals:
        return []
    text = next(given, None)
    return [] if text is None else [text]


def _with_arguments(found: list[str], recipes: list[str]) -> list[str]:
    """The recipes as arguments before all others."""
    return [*recipes, *found]
