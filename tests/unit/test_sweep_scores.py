"""Sweeps that are evaluated: the same counts as merges one by one, nothing left behind, the best point named."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

import mergecli
from mergecli import sweep_scores
from mergecli.errors import UsageError

RECIPE = Path(__file__).parents[2] / "recipes" / "toy.toml"
SHARED = {"tasks": ["digits", "colours"], "limit": 40}


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a temporary folder of the test's own."""
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.mark.parametrize("room", [1, 1 << 30])
def test_each_point_counts_what_its_merge_by_itself_counts(
    room: int, tmp_path: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_scores, "ROOM", room)
    swept = mergecli.sweep(
        RECIPE, ["method.scaling_factor=0.1,0.3", "method.density=0.1,0.2"], method="ties", output=tmp_path / "swept", **SHARED
    )  # fmt: skip
    assert list(own_folders.glob("mergecli*")) == []
    assert len(swept.results) == 4
    for point, result in zip(swept.points, swept.results, strict=True):
        merged = mergecli.merge(point.recipe, output=tmp_path / "alone.safetensors")
        (alone,) = mergecli.evaluate([merged.path], recipe=RECIPE, **SHARED)
        assert {task: score.correct for task, score in result.tasks.items()} == {
            task: score.correct for task, score in alone.tasks.items()
        }
        written = json.loads((tmp_path / "swept" / f"{point.name}.json").read_text())
        assert written["checkpoint"]["method.density"] == str(point.values["method.density"])
        assert written["checkpoint"]["digest"] == alone.checkpoint["digest"]


def test_the_best_point_is_chosen_on_another_split_and_told_on_the_tasks_own(tmp_path: Path) -> None:
    swept = mergecli.sweep(
        RECIPE, ["method.scaling_factor=0.0:0.4:0.2"], method="task_arithmetic", select="validation",
        output=tmp_path / "swept", keep=tmp_path / "kept", plot=tmp_path / "curve.svg", **SHARED,
    )  # fmt: skip
    averages = [result.average.accuracy for result in swept.results]
    assert averages[swept.best] == max(averages)
    assert {score.split for result in swept.results for score in result.tasks.values()} == {"validation"}
    assert swept.confirmed is not None
    assert {score.split for score in swept.confirmed.tasks.values()} == {"test"}
    assert swept.confirmed.name == swept.points[swept.best].name
    best = mergecli.evaluate(
        {swept.confirmed.name: tmp_path / "kept" / f"{swept.confirmed.name}.safetensors"},
        recipe=RECIPE,
        **SHARED,
    )
    assert best[0].average == swept.confirmed.average
    assert "is the best on validation; on the tasks' own split it has" in swept.table.notes[0]
    assert "best on validation" in (tmp_path / "curve.svg").read_text()
    assert json.loads((tmp_path / "swept" / "best.json").read_text())["tasks"]["digits"]["split"] == "test"


def test_a_best_point_that_was_chosen_on_its_own_images_says_so() -> None:
    swept = mergecli.sweep(RECIPE, ["method.scaling_factor=0.1,0.2"], method="ties", **SHARED)
    assert "chosen on the images that it is reported on" in swept.note
    assert swept.table.rows[swept.best][-1] == "best"


@pytest.mark.parametrize(
    ("over", "options", "message"),
    [
        (["method.scaling_factor=0.1,0.2"], {"output": "r.json"}, "so the output is a folder"),
        (["method.name=ties,average"], {"plot": "c.png"}, "a curve has one axis"),
        (
            ["method.density=0.1,0.2", "method.scaling_factor=0.1,0.2"],
            {"plot": "c.png"},
            "a curve has one axis",
        ),
        ([], {}, "a sweep goes over one or more settings"),
        (["method.density=0.1", "method.density=0.2"], {}, "each named once"),
    ],
)
def test_what_cannot_be_swept_is_said_before_any_work(
    over: list[str], options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        mergecli.sweep(RECIPE, over, method="ties", **options)
