"""Class names of the data and of the prompts are matched by name, whatever their order; what does not match is refused."""

from __future__ import annotations

import unicodedata
import warnings

import pytest

from mergecli.data.names import match_names, normalized, sorted_names
from mergecli.data.tasks import Task
from mergecli.runtime.errors import InputError, MergecliWarning
from mergecli.storage.sources import Source


def task(*classes: str, **given: object) -> Task:
    values: dict[str, object] = {
        "name": "birds", "description": "", "data": Source("path", "data", None, None), "config": None, "split": "test",
        "train_split": "train", "image_column": "image", "label_column": "label", "classes": classes or None,
        "templates": ("a {}",),
    }  # fmt: skip
    return Task(**values | given)  # type: ignore[arg-type]


def match(
    own: list[str] | None, known: Task, used: tuple[int, ...] = (0, 1)
) -> tuple[tuple[str, ...], list[int] | None, str]:
    found = match_names(own, used, known, "data: split `test`")
    labels = None if found.labels is None else [found.labels[label] for label in sorted(found.labels)]
    return found.names, labels, found.how


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Apple_Pie", "apple pie"),
        ("T-shirt/top", "t - shirt / top"),
        (unicodedata.normalize("NFD", "crème brûlée"), "Crème  Brûlée"),
        ("\uff21\uff22\uff23", "abc"),
        ("Straße", "STRASSE"),
        ("007", "7"),
        (" robin ", "robin"),
    ],
)
def test_case_spaces_hyphens_underscores_and_unicode_forms_do_not_count(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)


def test_other_characters_count() -> None:
    assert len({normalized(each) for each in ("a/b", "ab", "a.b", "a&b", "1a", "1")}) == 6


def test_names_that_are_whole_numbers_go_by_their_number() -> None:
    assert sorted_names({"10", "9", "1", "0"}) == ["0", "1", "9", "10"]
    assert sorted_names({"10", "9", "a"}) == ["10", "9", "a"]


def test_names_are_matched_whatever_their_order() -> None:
    assert match(["crow", "robin"], task("robin", "crow")) == (("robin", "crow"), [1, 0], "by name")
    assert match(["robin", "crow"], task("Robin", "CROW")) == (("Robin", "CROW"), None, "by name")


def test_equal_names_go_before_those_that_are_equal_without_case() -> None:
    assert match(["a", "A"], task("A", "a")) == (("A", "a"), [1, 0], "by name")


def test_without_names_in_the_task_those_of_the_data_are_used_in_their_order() -> None:
    assert match(["wren", "robin"], task()) == (("wren", "robin"), None, "the data's own names")


def test_numbers_without_names_are_the_position() -> None:
    assert match(None, task("robin", "wren")) == (("robin", "wren"), None, "labels are numbers")


@pytest.mark.parametrize(
    ("own", "labels"),
    [
        (["0", "1", "2"], None),
        (["1", "2", "3"], None),
        (["00", "01", "02"], None),
        (["0", "2", "1"], [0, 2, 1]),
    ],
)
def test_names_that_are_all_whole_numbers_stand_for_positions(
    own: list[str], labels: list[int] | None
) -> None:
    names = ("zero", "one", "two")
    assert match(own, task(*names)) == (names, labels, "by number")


@pytest.mark.parametrize("own", [["0", "1", "3"], ["2", "3", "4"], ["0", "1", "1"], ["0", "1"]])
def test_whole_numbers_with_a_gap_are_refused(own: list[str]) -> None:
    with pytest.raises(InputError, match="in the data"):
        match(own, task("zero", "one", "two"))


def test_what_does_not_match_is_refused_with_both_lists_side_by_side() -> None:
    with pytest.raises(InputError) as caught:
        match(["crow", "robin", "wren"], task("robin", "wren", "raven"))
    assert caught.value.message == (
        "data: split `test`: 1 of 3 class names of the data are not the task's\n"
        "  in the data  in the task\n"
        "  crow         raven\n"
        "  robin        robin\n"
        "  wren         wren"
    )
    assert caught.value.hint == (
        'under `[tasks.birds]`, `classes = { "crow" = "...", ... }` says for each name in the data the prompt\'s name; '
        '`match = "position"` takes both lists in their order'
    )


def test_long_lists_are_cut_and_differing_lengths_are_said() -> None:
    with pytest.raises(InputError) as caught:
        match([f"class {n}" for n in range(40)], task(*(f"other {n}" for n in range(41))))
    lines = caught.value.message.splitlines()
    assert lines[0].endswith("the data have 40 classes, the task has 41")
    assert (len(lines), lines[-1]) == (15, "  (and 29 more)")


def test_two_names_of_the_data_that_fit_one_of_the_task_are_refused() -> None:
    with pytest.raises(InputError, match="`Robin`, `robin_` differ only in case, spaces, `_` or `-`"):
        match(["Robin", "robin_", "wren"], task("robin", "wren"))


def test_names_that_differ_only_in_case_are_warned_of() -> None:
    message = (
        "the class names `Robin`, `robin` differ only in case or Unicode form, and are counted as 2 classes"
    )
    with pytest.warns(MergecliWarning, match=message):
        match(["Robin", "robin"], task())


def test_a_mapping_says_which_name_is_which_and_may_join_classes() -> None:
    mapping = (("n02", "wren"), ("n01", "robin"), ("n03", "robin"), ("n04", "crow"))
    known = task("wren", "robin", "crow", mapping=mapping)
    assert match(["n01", "n02", "n03"], known) == (
        ("wren", "robin", "crow"),
        [1, 0, 1],
        "as the recipe maps them",
    )


def test_a_mapping_of_labels_without_names_is_by_their_number() -> None:
    known = task("wren", "robin", mapping=(("3", "wren"), ("1", "robin")))
    assert match_names(None, (1, 3), known, "data").labels == {1: 1, 3: 0}


def test_a_mapping_without_one_of_the_data_s_names_is_refused() -> None:
    with pytest.raises(InputError, match="does not say what `n02` of the data is"):
        match(["n01", "n02"], task("robin", mapping=(("n01", "robin"),)))


def test_by_position_when_the_recipe_says_so_and_the_lists_are_as_long() -> None:
    assert match(["a", "b"], task("b", "c", match="position")) == (("b", "c"), None, "by position")
    with pytest.raises(InputError, match="the data have 2 classes, the task has 3"):
        match(["a", "b"], task("b", "c", "d", match="position"))


def test_a_built_in_task_s_own_data_may_write_names_otherwise_but_not_elsewhere() -> None:
    known = task("robin", "a wren", match="own data")
    with pytest.warns(
        MergecliWarning, match="1 of 2 class names are written otherwise .*: `wren` as `a wren`"
    ):
        assert match(["robin", "wren"], known) == (("robin", "a wren"), None, "by position")
    with pytest.raises(InputError, match="class names of the data are not the task's"):
        match(["wren", "robin"], known)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert match(["A Wren", "Robin"], known)[1] == [1, 0]
