"""Evaluations that were interrupted, and the store."""

from __future__ import annotations

import shutil

import pytest

from mergecli.clip import model
from mergecli.evaluation import counting
from mergecli.evaluation.evaluate import evaluate
from mergecli.runtime.errors import MergecliWarning


def counted(monkeypatch: pytest.MonkeyPatch, stop_at: str | None = None) -> list[str]:
    """The tasks that are counted from now on; at `stop_at` Ctrl-C is pressed."""
    seen: list[str] = []
    real = counting.count

    def count(slots, jobs, *more):
        if jobs[0].task == stop_at:
            raise KeyboardInterrupt
        seen.append(f"{jobs[0].task} {len(jobs)}")
        real(slots, jobs, *more)

    monkeypatch.setattr(counting, "count", count)
    return seen


def test_an_interrupted_evaluation_goes_on_where_it_was(place, recipe, tmp_path, monkeypatch):
    towers = [place / "base", place / "tower.safetensors"]
    given = {"recipe": recipe, "output": tmp_path / "out", "predictions": tmp_path / "p.parquet"}
    evaluate(towers, **given | {"output": tmp_path / "want", "predictions": tmp_path / "want.parquet"})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, stop_at="more")
        evaluate(towers, **given)
    assert len(list((tmp_path / "out" / ".units").iterdir())) == 2
    seen = counted(monkeypatch)
    evaluate(towers, **given)
    assert seen == ["more 2"]
    for name in ("base.json", "tower.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "want" / name).read_bytes()
    assert (tmp_path / "p.parquet").read_bytes() == (tmp_path / "want.parquet").read_bytes()
    evaluate(towers, **given)
    assert seen == ["more 2"]
    evaluate(towers, **given | {"fresh": True})
    assert seen == ["more 2", "tints 2", "more 2"]


def test_without_a_folder_an_interrupted_evaluation_resumes_from_the_cache_which_is_left_empty(
    place, recipe, tmp_path, monkeypatch
):
    given = {"recipe": recipe, "output": tmp_path / "r.json"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, stop_at="more")
        evaluate(place / "base", **given)
    kept = tmp_path / "home" / "cache" / "results"
    assert len(list(kept.iterdir())) == 1
    seen = counted(monkeypatch)
    evaluate(place / "base", **given)
    assert list(kept.iterdir()) == []
    evaluate(place / "base", **given)
    assert seen == ["more 1", "tints 1", "more 1"]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, ["more 1"]),
        ({"fresh": True}, ["tints 1", "more 1"]),
        ({"cache": False}, ["tints 1", "more 1"]),
        ({"batch_size": 5}, ["tints 1", "more 1"]),
        ({"dtype": "bfloat16"}, ["tints 1", "more 1"]),
        ({"limit": 6}, ["tints 1", "more 1"]),
        ({"split": "train"}, ["tints 1", "more 1"]),
        ({"corruption": "contrast"}, ["tints 1", "more 1"]),
        ({"clip": "other"}, ["tints 1", "more 1"]),
        ({"checkpoints": "base"}, ["tints 1", "more 1"]),
        ({"features": "features"}, ["tints 1", "more 1"]),
        ({"device": "cpu", "workers": 2, "predictions": "p.parquet", "output": "o.json"}, ["more 1"]),
    ],
)
def test_only_the_same_evaluation_goes_on(place, recipe, tmp_path, monkeypatch, change, again):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, stop_at="more")
        evaluate(place / "tower.safetensors", recipe=recipe)
    change = {
        key: place / value if key in ("clip", "checkpoints") else value for key, value in change.items()
    }
    seen = counted(monkeypatch)
    evaluate(**{"checkpoints": place / "tower.safetensors", "recipe": recipe, **change})
    assert seen == again


def test_a_damaged_count_of_an_interrupted_evaluation_is_made_anew(place, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, stop_at="more")
        evaluate(place / "other", recipe=recipe)
    (file,) = (tmp_path / "home" / "cache" / "results").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    seen = counted(monkeypatch)
    with pytest.warns(MergecliWarning, match=r"is cut short: .*; its images are counted again$"):
        evaluate(place / "other", recipe=recipe)
    assert seen == ["tints 1", "more 1"]


def test_a_home_that_cannot_be_written_changes_nothing(place, recipe, tmp_path):
    want = evaluate([place / "other"], recipe=recipe)
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home").write_text("a file where the folder should be")
    assert evaluate([place / "other"], recipe=recipe) == want
    assert evaluate([place / "other"], recipe=recipe, cache=False) == want


def test_without_a_cache_nothing_is_written(place, recipe, tmp_path):
    evaluate([place / "other"], recipe=recipe, cache=False)
    assert not (tmp_path / "home").exists()


def test_the_weights_of_one_checkpoint_are_put_in_once(place, recipe, monkeypatch):
    taken: list[str] = []
    real = model.set_tower
    monkeypatch.setattr(
        model, "set_tower", lambda clip, each: (taken.append(each.path.name), real(clip, each))
    )
    evaluate([place / "other"], recipe=recipe)
    assert taken == ["other"]
