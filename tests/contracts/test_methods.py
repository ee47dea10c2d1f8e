"""What every method promises."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType

import pytest

from mergecli import methods
from mergecli.methods import PerTensor
from mergecli.runtime.errors import UsageError

REQUIRED: dict[str, dict[str, object]] = {"weighted_average": {"weights": [1.0]}}
NUMBERS = [
    (name, setting.name)
    for name in methods.names()
    for setting in methods.settings(name).values()
    if setting.expected.removeprefix("a list, each ").startswith("a number")
]


@pytest.mark.parametrize("name", methods.names())
def test_a_method_says_what_it_is_where_it_comes_from_and_what_each_setting_means(name: str) -> None:
    method = methods.find(name)
    assert "theta" in (method.__doc__ or ""), "the docstring is the equation"
    assert method.title[0].islower()
    assert not method.title.endswith(".")
    assert method.paper == "none" or "arXiv" in method.paper
    for setting in methods.settings(name).values():
        assert setting.documentation, f"`{setting.name}` has no documentation"
        assert setting.required or setting.default is None or not setting.problem(setting.default), (
            f"the default of `{setting.name}` is refused"
        )


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_a_frozen_value(name: str) -> None:
    method = methods.find(name)
    required = REQUIRED.get(name, {})
    one, other = methods.create(name, required), methods.create(name, required)
    assert one == other
    assert hash(one) == hash(other)
    if fields := dataclasses.fields(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, fields[0].name, 1)


@pytest.mark.parametrize(("name", "key"), NUMBERS)
def test_a_whole_number_for_a_setting_that_may_be_another_is_held_as_a_float(name: str, key: str) -> None:
    setting = methods.settings(name)[key]
    several = setting.expected.startswith("a list")
    given = [1, 2] if several else 0 if setting.problem(1) else 1
    method = methods.create(name, {**REQUIRED.get(name, {}), key: given})
    held = getattr(method, key) if several else [getattr(method, key)]
    assert [type(each) for each in held] == [float] * len(held)
    assert list(held) == (given if several else [given])


def test_a_method_file_that_is_not_complete_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    file = ModuleType("mergecli.methods.half")
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setattr(methods, "names", lambda: ["half"])
    with pytest.raises(UsageError) as none:
        methods.find("half")
    assert none.value.message == "mergecli/methods/half.py: expected one class that is a method, got 0"
    file.Half = type("Half", (PerTensor,), {"__module__": file.__name__})  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UsageError) as lacking:
        methods.find("half")
    assert lacking.value.message == "mergecli/methods/half.py: `Half` lacks `title` and `paper`"
