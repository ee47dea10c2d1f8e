"""The space of a search: what is written, which settings a method has, and the points of a grid."""

from __future__ import annotations

from typing import Any

import pytest

from mergecli import methods
from mergecli.evaluation.search_space import Dimension, Space, grid, parse_dimension
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import UsageError

SHAPE = "`method.SETTING=LOW:HIGH`, `LOW:HIGH:log`, `LOW:HIGH:STEP` or `VALUE,VALUE,...`"


def recipe(**method: Any) -> Recipe:
    return recipe_of(
        {"a": "toy:digits", "b": "toy:letters"},
        base="toy:base",
        method=method.pop("name", None),
        settings=method,
    )


def space(*written: str, **method: Any) -> Space:
    return Space.of(written, recipe(**method))


def test_ranges_steps_logarithms_and_values_are_read() -> None:
    assert parse_dimension("method.a=0.05:1.0") == Dimension("method.a", 0.05, 1.0)
    assert parse_dimension("method.a=1:64") == Dimension("method.a", 1.0, 64.0, whole=True)
    assert parse_dimension("method.a=0.05:0.5:log") == Dimension("method.a", 0.05, 0.5, log=True)
    assert parse_dimension("method.a=0.1:0.45:0.1") == Dimension("method.a", 0.1, 0.4, 0.1), (
        "the last step ends below"
    )
    assert parse_dimension("method.a=-1:1").low == -1
    assert parse_dimension("method.name=ties,dare").values == ("ties", "dare")
    assert parse_dimension('method.of={ name = "ties", density = 0.1 },average').values == (
        {"name": "ties", "density": 0.1},
        "average",
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("density=0.1:0.2", f"expected {SHAPE} (did you mean `method.density=0.1:0.2`?)"),
        ("method.a", f"expected {SHAPE}"),
        ("method.a=0.1:x", f"expected {SHAPE}"),
        ("method.a=1:0.1", "expected a range from a lower to a higher number"),
        ("method.a=0:inf", "expected a range from a lower to a higher number"),
        ("method.a=0:1:log", "a range with `log` begins above 0"),
        ("method.a=0:1:2", "expected a step above 0 and at most 1"),
        ("method.a=0.5", "one value is nothing to search; `--set method.a=0.5` sets it"),
        ("method.a=1,1", "a value stands there twice"),
    ],
)
def test_what_is_no_dimension_is_refused(text: str, what: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_dimension(text)
    assert error.value.message == f"--space `{text}`: {what}"


def test_a_share_of_a_range_is_a_number_that_people_can_read() -> None:
    assert Dimension("k", 0.0, 1.0).at(1 / 3) == 0.3333
    assert Dimension("k", 0.01, 1.0, log=True).at(0.5) == 0.1
    assert Dimension("k", 0.1, 0.4, 0.1).at(0.99) == 0.4
    assert Dimension("k", 1.0, 64.0, whole=True).at(0.5) == 32
    assert Dimension("k", 0.05, 0.12345678).at(1) == 0.12345678, "rounding does not leave the range"
    for dimension in (
        Dimension("k", 0.01, 1.0, log=True),
        Dimension("k", 0.0, 1.0),
        Dimension("k", values=("a", "b", "c")),
    ):
        assert dimension.at(dimension.share(dimension.at(0.7))) == dimension.at(0.7)


def test_a_setting_that_a_method_has_not_is_left_out_and_a_modifier_has_those_of_its_method() -> None:
    searched = space(
        "method.scaling_factor=0.05:1.0", "method.density=0.05:0.5:log", "method.name=ties,dare,tsv_m", name="ties", aggregate="max"
    )  # fmt: skip
    assert searched.dimensions[0].key == "method.name"

    def built(name: str) -> methods.Method:
        values = searched.values(lambda each: name if each.key == "method.name" else each.at(0.5))
        return recipe_of(searched.recipe, overrides=searched.overrides(values)).built

    ties: Any = built("ties")
    assert (ties.scaling_factor, ties.density, ties.aggregate) == (0.525, 0.1581, "max")
    dare: Any = built("dare")
    assert methods.table_of(dare) == {
        "of": {"name": "task_arithmetic", "scaling_factor": 0.525}, "drop_rate": 0.5, "rescale": True,
    }  # fmt: skip
    assert methods.table_of(built("tsv_m"))["scaling_factor"] == 0.525
    inner = space("method.density=0.1:0.2", "method.of=ties,average", name="dare")
    chosen = [
        inner.values(lambda each, of=of: of if each.values else each.at(0)) for of in ("ties", "average")
    ]
    assert chosen == [{"method.of": "ties", "method.density": 0.1}, {"method.of": "average"}]
    assert recipe_of(inner.recipe, overrides=inner.overrides(chosen[0])).built.of.density == 0.1  # type: ignore[attr-defined]


def test_settings_by_layer_and_the_ends_of_gradients_can_be_searched() -> None:
    searched = space(
        "method.layers[0].scaling_factor.first=0.1:0.5", "method.layers[1].density=0.1:0.3", name="ties",
        layers=[{"match": "mlp", "scaling_factor": {"first": 0.3, "last": 0.4}}, {"match": "norm"}],
    )  # fmt: skip
    values = searched.values(lambda each: each.at(1))
    lines = recipe_of(searched.recipe, overrides=searched.overrides(values)).built.layers
    assert [line.settings for line in lines] == [
        {"scaling_factor": {"first": 0.5, "last": 0.4}},
        {"density": 0.3},
    ]


def test_numbers_are_whole_only_where_the_setting_is() -> None:
    assert not space("method.scaling_factor=0:2", name="ties").dimensions[0].whole
    assert space("method.rank=1:8", name="dc_merge").dimensions[0].whole


@pytest.mark.parametrize(
    ("written", "method", "what"),
    [
        ([], "ties", "there is nothing to search"),
        (["method.density=0.1:0.2"], None, "no method is named"),
        (["method.densty=0.1:0.2"], "ties", "--space method.densty: is a setting of none of `ties`"),
        (
            ["method.name=ties,tise"],
            None,
            "--space method.name: unknown method `tise` (did you mean `ties`?)",
        ),
        (
            ["method.density=0.1:0.2", "method.density=0.1:0.3"],
            "ties",
            "--space: `method.density` stands there twice",
        ),
    ],
)
def test_a_space_that_fits_no_method_is_refused(written: list[str], method: str | None, what: str) -> None:
    with pytest.raises(UsageError) as error:
        space(*written, name=method)
    assert error.value.message == what


def test_a_grid_is_as_large_as_the_trials_allow() -> None:
    assert len(grid(space("method.scaling_factor=0.1:1.0", "method.density=0.1:0.5", name="ties"), 40)) == 36
    assert (
        len(grid(space("method.scaling_factor=0.1:0.8:0.1", "method.density=0.1:0.5:0.1", name="ties"), 40))
        == 40
    )
    named = grid(space("method.name=ties,average", "method.density=0.1:0.5", name="ties"), 6)
    assert named.count({"method.name": "average"}) == 1, "a method that has no density has one point"
    assert len(named) == 6
    with pytest.raises(UsageError) as error:
        grid(space("method.scaling_factor=0.1:0.8:0.1", name="ties"), 7)
    assert error.value.message == "--trials: the grid has 8 points, got 7"
