"""Values taken out of tables, and what is wrong with them."""

from __future__ import annotations

import pytest

from mergecli.storage.table_reader import TableReader


def test_values_that_fit_are_returned_as_they_are() -> None:
    read = TableReader()
    assert read.table({"a": 1}, "t", ("a", "b")) == {"a": 1}
    assert (read.whole(0, "n"), read.number(2, "n"), read.number(-0.5, "n")) == (0, 2, -0.5)
    assert (read.text("x", "s"), read.texts(["x", "y"], "s"), read.one_of("y", "s", ("x", "y"))) == (
        "x",
        ("x", "y"),
        "y",
    )
    assert (read.flag(True, "f"), read.flag(False, "f")) == (True, False)
    assert read.problems == []


def test_everything_that_is_wrong_is_collected_and_replaced_by_a_value_of_its_type() -> None:
    read = TableReader()
    assert read.table([1], "t") == {}
    assert read.table({"colour": 1}, "t", ("color",)) == {"colour": 1}
    assert (read.whole(True, "n", 1), read.number(float("nan"), "x"), read.number(10**400, "x")) == (1, 0, 0)
    assert (read.text("", "s"), read.texts(["x", ""], "s"), read.one_of("z", "s", ("x", "y"))) == (
        "",
        (),
        "x",
    )
    assert read.flag(1, "f") is False
    assert read.text(None, "s") == ""
    assert [str(each).partition(", got")[0] for each in read.problems] == [
        "`t`: expected a table",
        "`t.colour`: unknown key (did you mean `color`?)",
        "`n`: expected a whole number, at least 1",
        "`x`: expected a number",
        "`x`: expected a number",
        "`s`: expected a string that is not empty",
        "`s`: expected a list of strings",
        "`s`: expected one of x, y",
        "`f`: expected true or false",
        "`s`: expected a string",
    ]
    assert read.problems[-1].what == "expected a string, got nothing"


def test_the_first_problem_is_raised_where_that_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r'^`size`: expected a whole number, at least 0, got "3"$'):
        TableReader(at_once=True).whole("3", "size")
