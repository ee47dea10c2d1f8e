"""The Python API is the program a second time."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

import mergecli
from mergecli.cli import COMMANDS
from mergecli.cli.options import ENGINE_OPTIONS

FUNCTIONS = {module.rpartition(".")[2]: module for module in COMMANDS.values()}
LISTS = {"methods", "tasks"}
"""Commands without a function: Python has the rooms `mergecli.methods` and `mergecli.data.tasks`."""
ONLY_IN_THE_PROGRAM = {"as_json", "form", "min_average", "min_task", "sweep"}
ONLY_IN_PYTHON = {"progress", "note", "settings", "format", "data"}
CHOICES_OF_WHAT_IS_PRINTED = {"info": {"keys", "recipe", "coefficients"}}
SAME = {"models": "recipe"}


def test_every_command_is_a_function_of_the_package_too() -> None:
    assert set(FUNCTIONS) - set(mergecli.__all__) == LISTS


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - LISTS))
def test_a_command_and_its_function_have_the_same_parameters(name: str) -> None:
    command = getattr(import_module(FUNCTIONS[name]), name)
    program = {SAME.get(each, each) for each in inspect.signature(command).parameters}
    if "engine" in program:  # Python takes a `mergecli.Engine`
        program -= {each.name for each in ENGINE_OPTIONS if each.name != "engine"}
    program -= ONLY_IN_THE_PROGRAM | CHOICES_OF_WHAT_IS_PRINTED.get(name, set())
    python = set(inspect.signature(getattr(mergecli, name)).parameters) - ONLY_IN_PYTHON
    if name == "evaluate":
        program -= (
            set(inspect.signature(mergecli.sweep).parameters) - python
        )  # `--sweep` makes it `mergecli.sweep`
    if name == "finetune":
        program -= {"each", "engine"}  # `--each` makes it `mergecli.finetune_each`
    if name in ("merge", "evaluate", "continual", "finetune", "search"):
        program -= {"dry_run"}  # `mergecli.plan` of the function
    if name in ("evaluate", "finetune"):
        program -= {"changes"}  # the recipe is read by the command
    assert program == python


def test_every_public_name_can_be_imported() -> None:
    for name in mergecli.__all__:
        assert getattr(mergecli, name) is not None


def test_every_error_that_a_caller_may_catch_is_public() -> None:
    from mergecli.runtime import errors

    own = {
        name
        for name, each in vars(errors).items()
        if isinstance(each, type) and issubclass(each, (Exception, Warning))
    }
    assert own - {"ThresholdError"} <= set(mergecli.__all__)  # only the program has thresholds


def test_no_public_name_is_a_modules_name_too() -> None:
    import pkgutil

    assert {module.name for module in pkgutil.iter_modules(mergecli.__path__)} & set(
        mergecli.__all__
    ) == set()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mrege'"):
        mergecli.mrege  # noqa: B018
