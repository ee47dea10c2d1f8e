"""What of a report may be compared, and what it warns of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mergecli.results.report import report
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
