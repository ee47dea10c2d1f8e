"""What every method promises."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mergecli import methods

TESTS = Path(__file__).parents[1] / "golden"
REQUIRED: dict[str, dict[str, object]] = {"weighted_average": {"weights": [1.0]}}
NUMBERS = [
    (name, setting.name)
    for name in methods.names()
    for setting in methods.settings(name).values()
    if setting.expected.removeprefix("a list, each ").startswith("a number")
]
REFERENCES = (
    "naive",
    "naive_more",
    "naive_routed",
    "naive_spectral",
    "naive_calibrated",
    "naive_adapted",
    "naive_mixtures",
    "naive_surgery",
)


@pytest.mark.parametrize("name", methods.names())
def test_a_method_says_what_it_is_where_it_comes_from_and_what_each_setting_means(name: str) -> None:
    method = methods.find(name)
    assert "theta" in (method.__doc__ or ""), "the docstring is the equation"
    assert method.title[0].islower()
    assert not method.title.endswith(".")
    assert "arXiv" in method.paper
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


@pytest.mark.parametrize("name", methods.names())
def test_a_method_has_a_golden_test_against_a_reference_of_its_own(name: str) -> None:
    references = "".join((TESTS / f"{module}.py").read_text() for module in REFERENCES)
    texts = [file.read_text() for file in TESTS.glob("test_*.py")]
    assert f"def {name}(" in references, "there is a naive version"
    assert any(f'"{name}"' in text and f".{name}(" in text for text in texts), "a test compares with it"
