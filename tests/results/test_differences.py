"""What of a report may be compared, and what it warns of."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mergecli.results.cells import Estimate
from mergecli.results.report import report
from mergecli.results.statistics import mcnemar
from mergecli.runtime.errors import InputError
from tests.results.test_report import column, names, predictions, result


def test_a_baseline_and_a_fine_tuned_result_of_other_images_are_warned_of(tmp_path: Path) -> None:
    plain, other = result("plain", mnist=0.5), result("other", mnist=0.75)
    score = replace(other.tasks["mnist"], corruption="contrast", severity=5)
    other = replace(other, tasks={"mnist": score})
    (tmp_path / "other.json").write_text(other.to_json())
    for options in (
        {"against": tmp_path / "other.json"},
        {"normalized": True, "fine_tuned": tmp_path / "other.json"},
    ):
        warnings = report([plain], **options).warnings  # pyright: ignore[reportArgumentType]
        assert "the images were corrupted: `contrast 5`" in warnings
        assert "the results are of different corruptions: `mnist`" in warnings
    assert (
        "not on the same images as `other`: `mnist`"
        in report([plain], against=tmp_path / "other.json").warnings
    )


def test_predictions_on_corrupted_images_are_not_paired_with_others(tmp_path: Path) -> None:
    plain, other = result("plain", None, 4, mnist=0.5), result("other", None, 4, mnist=0.75)
    corrupted = replace(other.tasks["mnist"], corruption="contrast", severity=5)
    file = predictions(tmp_path / "p.parquet", plain={"mnist": [1, 1, 0, 0]}, other={"mnist": [1, 1, 1, 0]})
    with pytest.raises(InputError, match="were not evaluated on the same images of `mnist`"):
        report([plain, replace(other, tasks={"mnist": corrupted})], against="plain", predictions=[file])


MANY = [1] * 20 + [0] * 20, [1] * 30 + [0] * 10


def test_the_pairs_that_have_predictions_are_tested_and_the_others_compared_unpaired(tmp_path: Path) -> None:
    models = [result(name, None, 40, mnist=0.5, dtd=0.5) for name in ("base", "both", "one", "none")]
    models[1:] = [result(each.name, None, 40, mnist=0.75, dtd=0.75) for each in models[1:]]
    both = {"mnist": MANY[1], "dtd": MANY[1]}
    file = predictions(
        tmp_path / "p.parquet", base={"mnist": MANY[0], "dtd": MANY[0]}, both=both, one={"mnist": MANY[1]}
    )
    table = report(models, against="base", predictions=[file])
    shown = [line.split(" | ")[-3:] for line in table.text("md").splitlines()[3:6]]
    assert shown[0] == ["+25.0", "+25.0", "+25.0 |"]
    assert shown[1] == ["+25.0", "+25.0 ±21.2", "+25.0 ±15.0 |"]
    assert shown[2] == ["+25.0 ±21.2", "+25.0 ±21.2", "+25.0 ±15.0 |"]
    assert table.warnings == (
        "predictions: there are none of `one` on `dtd`: compared unpaired",
        "predictions: there are none of `none` on `mnist`, `dtd`: compared unpaired",
    )
    for part, note in zip(
        ("n.s.: not significant", "paired bootstrap", "unpaired"), table.notes, strict=True
    ):
        assert part in note


def test_p_values_are_corrected_for_the_number_of_rows_and_decide_alone(tmp_path: Path) -> None:
    """One of three differences is significant by itself, and not among three."""
    right = {
        "a": [1] * 20 + [0] * 20,
        "b": [1] * 26 + [0] * 14,
        "c": [1] * 21 + [0] * 19,
        "d": [1] * 30 + [0] * 10,
    }
    file = predictions(tmp_path / "p.parquet", **{name: {"mnist": each} for name, each in right.items()})
    models = [result(name, None, 40, mnist=sum(each) / 40) for name, each in right.items()]
    options = {"against": "a", "predictions": [file]}
    table = report(models, p_values=True, **options)  # pyright: ignore[reportArgumentType]
    assert names(table)[-4:] == ["mnist (diff.)", "mnist (p)", "average (diff.)", "average (p)"]
    alone = {"b": mcnemar(6, 0), "c": mcnemar(1, 0), "d": mcnemar(10, 0)}
    assert alone["b"] == 1 / 32
    assert column(table, "mnist (p)") == [None, 2 / 32, 1.0, 3 * alone["d"]]
    assert column(table, "average (p)") == column(table, "mnist (p)")
    cells = [each for each in column(table, "mnist (diff.)") if isinstance(each, Estimate)]
    assert [each.significant for each in cells] == [False, False, True]
    assert [each.partition("(diff.)")[0] for each in table.text("md").splitlines()[3:4]] == [
        "| b | - | 65.0 | 65.0 | +15.0 | 0.062 | +15.0 | 0.062 |"
    ]
    assert "n.s." not in table.notes[0]
    assert table.notes[0].endswith("(p): the corrected p-value.")
    marked = report(models, **options).text("md").splitlines()  # pyright: ignore[reportArgumentType]
    assert marked[3].endswith("| +15.0 n.s. | +15.0 n.s. |")
    assert marked[5].endswith("| +25.0 | +25.0 |")
    with_intervals = report(models, intervals=True, **options)  # pyright: ignore[reportArgumentType]
    assert "n.s." not in with_intervals.text("latex")


def test_a_whole_table_never_has_an_interval_and_a_mark_in_one_cell(tmp_path: Path) -> None:
    """Five images to none: the bootstrap's interval ends above 0, and McNemar's test finds no significance."""
    file = predictions(tmp_path / "p.parquet", a={"mnist": [0] * 40}, b={"mnist": [1] * 5 + [0] * 35})
    models = [result("a", None, 40, mnist=0), result("b", None, 40, mnist=0.125)]
    for more in ({}, {"intervals": True}, {"p_values": True}, {"intervals": True, "p_values": True}):
        table = report(models, against="a", predictions=[file], **more)
        cell = column(table, "mnist (diff.)")[1]
        assert isinstance(cell, Estimate)
        assert cell.low > 0
        assert cell.significant is False
        for form in ("md", "latex", "html"):
            assert not re.search(r"(±|pm)[^|&<]*n\.s\.", table.text(form))


def test_rows_say_which_images_they_are_of_where_that_differs() -> None:
    plain, other = result("m", mnist=0.5, dtd=0.5), result("m", mnist=0.25, dtd=0.25)
    tasks = {name: replace(each, corruption="contrast", severity=5) for name, each in other.tasks.items()}
    table = report([plain, replace(other, tasks=tasks)])
    assert [str(cell) for cell in column(table, "images")] == ["test", "test, contrast 5"]
    assert "images" not in names(report([plain]))


def test_a_method_that_looked_at_the_images_it_is_evaluated_on_is_named() -> None:
    ours = result("ada", "ada_merging", mnist=0.5, dtd=0.5)
    own = {"split": "test", "data": str(ours.tasks["mnist"].data["fingerprint"])}
    looked = replace(ours, looked_at={"mnist": own, "dtd": own | {"split": "train"}})
    assert report([looked]).warnings == (
        "`ada` was learned on the same images that it is evaluated on, without labels: `mnist`",
    )


def test_seen_and_unseen_tasks_are_known_from_the_merged_models() -> None:
    ours = replace(result("m", "ties", mnist=0.8, dtd=0.6, svhn=0.1), models={"mnist": "a", "dtd": "b"})
    table = report([ours])
    assert names(table)[-2:] == ["average (seen)", "average (unseen)"]
    assert table.rows[0][-2:] == pytest.approx((0.7, 0.1))
    every = replace(ours, models={"mnist": "a", "dtd": "b", "svhn": "c"})
    assert names(report([every]))[-1] == "average"


def test_results_that_cannot_be_compared_are_warned_of() -> None:
    one, other = result("one", mnist=0.5), result("other", mnist=0.5)
    score = other.tasks["mnist"]
    for change, message in (
        ({"data": {"source": "x", "fingerprint": "z"}}, "the results are of different images: `mnist`"),
        ({"split": "train"}, "the results are of different splits: `mnist`"),
        ({"classes": "d"}, "the results are of different class names: `mnist`"),
        ({"templates": "u"}, "the results are of different templates: `mnist`"),
    ):
        changed = replace(other, tasks={"mnist": replace(score, **change)})
        assert report([one, changed]).warnings == (message,)
    assert report([one, replace(other, dtype="float16")]).warnings == (
        "the results were computed in different dtypes",
    )
    assert report([one, replace(other, clip={"path": "p", "digest": "e"})]).warnings == (
        "the results are of different CLIPs",
    )
    clip = {**other.clip, "text": "t"}
    assert report([replace(one, clip=clip), replace(other, clip={**clip, "text": "u"})]).warnings == (
        "the results are of different CLIPs",
    )
    assert report([replace(one, clip=clip), other]).warnings == ()  # files of before do not say
    ways = [replace(each, clip={**each.clip, "processing": way}) for each, way in ((one, "v"), (other, "w"))]
    assert report(ways).warnings == ("the images were processed in different ways",)
    assert report([one, other]).warnings == ()
