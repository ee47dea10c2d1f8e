"""Sweeps that are evaluated: the same counts as merges one by one, nothing left behind, the best point named."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

import mergecli
from mergecli.evaluation import sweep as sweep_scores
from mergecli.evaluation.counting import Counts
from mergecli.evaluation.sweep import MergedPoints
from mergecli.merging.sweep_points import Identities
from mergecli.results.result import read_result
from mergecli.runtime.errors import UsageError

TOY = Path(__file__).parents[2] / "recipes" / "toy.toml"


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a temporary folder of the test's own."""
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.mark.parametrize("room", [1, 1 << 30])
def test_each_point_counts_what_its_merge_by_itself_counts(
    recipe_file: Path, room: int, tmp_path: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_scores, "ROOM", room)
    swept = mergecli.sweep(
        recipe_file, ["method.scaling_factor=0.1,0.3", "method.density=0.1,0.2"], method="ties", output=tmp_path / "swept"
    )  # fmt: skip
    assert list(own_folders.glob("mergecli*")) == []
    assert len({result.average.loss for result in swept.results}) == 4
    for point, result in zip(swept.points, swept.results, strict=True):
        merged = mergecli.merge(point.recipe, output=tmp_path / "alone.safetensors")
        (alone,) = mergecli.evaluate([merged.path], recipe=recipe_file)
        assert {task: score.correct for task, score in result.tasks.items()} == {
            task: score.correct for task, score in alone.tasks.items()
        }
        assert result.average.loss == pytest.approx(alone.average.loss, rel=1e-6)
        written = json.loads((tmp_path / "swept" / f"{point.name}.json").read_text())
        assert written["checkpoint"]["method.density"] == str(point.values["method.density"])
        assert written["checkpoint"]["digest"] == alone.checkpoint["digest"]


def test_the_best_point_is_chosen_on_another_split_and_told_on_the_tasks_own(
    recipe_file: Path, tmp_path: Path
) -> None:
    swept = mergecli.sweep(
        recipe_file, ["method.scaling_factor=0.0:0.4:0.2"], method="task_arithmetic", select="validation",
        output=tmp_path / "swept", keep=tmp_path / "kept", plot=tmp_path / "curve.svg",
    )  # fmt: skip
    averages = [result.average.accuracy for result in swept.results]
    assert averages[swept.best] == max(averages)
    assert {score.split for result in swept.results for score in result.tasks.values()} == {"validation"}
    assert swept.confirmed is not None
    assert {score.split for score in swept.confirmed.tasks.values()} == {"test"}
    assert swept.confirmed.name == swept.points[swept.best].name
    best = mergecli.evaluate(
        {swept.confirmed.name: tmp_path / "kept" / f"{swept.confirmed.name}.safetensors"},
        recipe=recipe_file,
    )
    assert best[0].average == swept.confirmed.average
    assert "is the best on validation; on the tasks' own split it has" in swept.table.notes[0]
    assert "best on validation" in (tmp_path / "curve.svg").read_text()
    assert json.loads((tmp_path / "swept" / "best.json").read_text())["tasks"]["tints"]["split"] == "test"


def test_a_best_point_that_was_chosen_on_its_own_images_says_so(recipe_file: Path) -> None:
    swept = mergecli.sweep(recipe_file, ["method.scaling_factor=0.1,0.2"], method="ties")
    assert "chosen on the images that it is reported on" in swept.note
    assert swept.table.rows[swept.best][-1] == "best"
    assert swept.table.rows[1 - swept.best][-1] == "n.s."
    assert swept.note.endswith("n.s.: chance alone may put it before these 1")
    again = mergecli.sweep(recipe_file, ["method.scaling_factor=0.1"], method="ties", select="test")
    assert "chosen on the images that it is reported on" in again.note
    assert "n.s." not in again.note


def test_points_that_differ_by_more_than_chance_are_not_marked() -> None:
    swept = mergecli.sweep(
        TOY, ["method.scaling_factor=0.2,-2.0"], method="task_arithmetic", tasks=["colours"], limit=60
    )
    assert [row[-1] for row in swept.table.rows] == ["best", ""]


def test_an_interrupted_sweep_evaluates_what_was_left(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = ["method.scaling_factor=0.1,0.2,0.3"]
    monkeypatch.setattr(sweep_scores, "ROOM", 1)  # each point by itself
    whole = mergecli.sweep(recipe_file, over, method="ties", select="validation", output=tmp_path / "whole")
    counted: list[str] = []

    def stop(description: str, done: int, total: int) -> None:
        if len(counted) == 2:  # Ctrl-C at the first image of the third point
            raise KeyboardInterrupt
        if description == "more" and done == total:
            counted.append(description)

    with pytest.raises(KeyboardInterrupt):
        mergecli.sweep(
            recipe_file,
            over,
            method="ties",
            select="validation",
            output=tmp_path / "swept",
            progress=stop,
        )
    assert sorted(file.name for file in (tmp_path / "swept").iterdir()) == [".units", "units.jsonl"]
    assert len(list((tmp_path / "swept" / ".units").iterdir())) == 4
    shown: list[int] = []
    add = Counts.add
    monkeypatch.setattr(
        Counts, "add", lambda self, scores, labels: shown.append(len(labels)) or add(self, scores, labels)
    )
    again = mergecli.sweep(recipe_file, over, method="ties", select="validation", output=tmp_path / "swept")
    assert again.results == whole.results
    assert sum(shown) == (3 + 3) + (12 + 20)  # validation images of the third point, then all of the best one
    for file in (tmp_path / "whole").glob("*.json"):
        assert (tmp_path / "swept" / file.name).read_bytes() == file.read_bytes()


def test_the_best_result_says_what_it_was_chosen_on_and_is_no_point_of_a_curve(
    recipe_file: Path, tmp_path: Path
) -> None:
    mergecli.sweep(
        recipe_file,
        ["method.scaling_factor=0.1,0.2"],
        method="ties",
        select="validation",
        output=tmp_path / "swept",
    )
    files = sorted((tmp_path / "swept").glob("*.json"))
    assert [read_result(file).checkpoint.get("selected_on") for file in files] == [
        "validation",
        None,
        None,
    ]
    table = mergecli.report(files, plot=tmp_path / "curve.svg", plot_kind="sweep")
    assert str(table.rows[0][0]).endswith(", chosen on validation")
    assert [column.name for column in table.columns][:3] == ["model", "method", "images"]
    assert [row[2] for row in table.rows] == ["test", "validation", "validation"]
    assert "scaling_factor" in (tmp_path / "curve.svg").read_text()


def test_curves_over_one_of_several_settings_are_the_averages_for_the_others(
    recipe_file: Path, tmp_path: Path
) -> None:
    mergecli.sweep(
        recipe_file, ["method.density=0.1,0.2", "method.scaling_factor=0.1,0.2,0.3"], method="ties", plot=tmp_path / "c.svg",
    )  # fmt: skip
    drawn = (tmp_path / "c.svg").read_text()
    for text in ("density 0.1", "density 0.2", "ties: scaling_factor", "average accuracy (%)"):
        assert f"<!-- {text}" in drawn or f">{text}" in drawn, text


@pytest.mark.parametrize(
    ("over", "options", "message"),
    [
        (["method.scaling_factor=0.1,0.2"], {"output": "r.json"}, "so the output is a folder"),
        (
            ["method.name=ties,average"],
            {"plot": "c.png"},
            "a curve needs a swept setting whose values are numbers",
        ),
        ([], {}, "a sweep goes over one or more settings"),
        (["method.density=0.1", "method.density=0.2"], {}, "each named once"),
    ],
)
def test_what_cannot_be_swept_is_said_before_any_work(
    recipe_file: Path, over: list[str], options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        mergecli.sweep(recipe_file, over, method="ties", **options)


def test_merges_stay_for_the_next_stage_where_they_were_started_and_leave_other_machines(
    tmp_path: Path,
) -> None:
    (tmp_path / "merges").mkdir()
    here = MergedPoints({}, Identities({}, {}), tmp_path / "merges", "cpu")
    here.leave()
    assert (tmp_path / "merges").exists()
    replace(here, owner="another machine").leave()
    assert not (tmp_path / "merges").exists()
