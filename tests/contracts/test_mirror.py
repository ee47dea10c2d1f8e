"""The Python API is the program a second time."""

from __future__ import annotations

import inspect

import pytest

import mergecli
from mergecli.cli import (
    cache,
    cos_sim,
    evaluate,
    extract,
    fetch,
    finetune,
    measure,
    merge,
    report,
    taskvector,
)

PAIRS = {
    "merge": merge.merge, "evaluate": evaluate.evaluate, "cos_sim": cos_sim.cos_sim, "report": report.report,
    "taskvector": taskvector.taskvector, "finetune": finetune.finetune, "fetch": fetch.fetch,
    "cache": cache.cache, "extract": extract.extract, "measure": measure.measure,
}  # fmt: skip
ONLY_IN_THE_PROGRAM = {"as_json", "form", "min_average", "min_task", "sweep"}
ONLY_IN_PYTHON = {"progress", "settings", "format", "data", "unfinished"}
SAME = {"models": "recipe"}


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_a_command_and_its_function_have_the_same_parameters(name: str) -> None:
    program = {
        SAME.get(each, each) for each in inspect.signature(PAIRS[name]).parameters
    } - ONLY_IN_THE_PROGRAM
    python = set(inspect.signature(getattr(mergecli, name)).parameters) - ONLY_IN_PYTHON
    if name == "evaluate":
        program -= (
            set(inspect.signature(mergecli.sweep).parameters) - python
        )  # `--sweep` makes it `mergecli.sweep`
    if name in ("evaluate", "finetune"):
        program -= {"changes"}  # the recipe is read by the command
    assert program == python


def test_every_public_name_can_be_imported() -> None:
    for name in mergecli.__all__:
        assert getattr(mergecli, name) is not None


def test_no_public_name_is_a_modules_name_too() -> None:
    import pkgutil

    assert {module.name for module in pkgutil.iter_modules(mergecli.__path__)} & set(
        mergecli.__all__
    ) == set()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mrege'"):
        mergecli.mrege  # noqa: B018
