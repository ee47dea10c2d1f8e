"""Evaluations that were interrupted, the store, and dual encoders other than CLIP."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergecli
from mergecli.clip import model
from mergecli.data.tasks import TaskTable
from mergecli.evaluation import counting
from mergecli.evaluation.evaluate import evaluate
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError, MergecliWarning
from mergecli.storage.sources import parse_source
from tests.support.tiny_clip import CLASSES
from tests.support.tiny_dual_encoders import make_tiny_dual_encoder


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


def predicted_by_transformers(folder: Path, tower: Path | None, data: Path) -> list[int]:
    """The class that the library's own model gives to each test image, one image at a time."""
    import datasets
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    model: Any = AutoModel.from_pretrained(folder).eval()
    if tower is not None:
        model.load_state_dict(load_file(tower), strict=False)
    tokens = AutoTokenizer.from_pretrained(folder)(
        [f"a photo of something {name}." for name in CLASSES], padding="max_length", return_tensors="pt"
    )
    processor = AutoImageProcessor.from_pretrained(folder)
    test = datasets.Dataset.from_parquet(
        str(next(data.glob("test-*.parquet"))), cache_dir=str(data.parent / "plain")
    )
    found: list[int] = []
    for row in test:
        with torch.no_grad():
            inputs = processor(images=[row["image"].convert("RGB")], return_tensors="pt")
            found.append(int(model(**inputs, **tokens).logits_per_image.argmax()))
    return found


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_predictions_of_a_siglip_and_a_tuned_tower_are_those_of_transformers(place, tmp_path, kind):
    from pyarrow import parquet

    folder = make_tiny_dual_encoder(tmp_path / "base", kind)
    noise, weights = torch.Generator().manual_seed(1), load_file(folder / "model.safetensors")
    tuned = {
        name: each + 0.2 * torch.randn(each.shape, generator=noise)
        for name, each in weights.items()
        if name.startswith("vision_model.")
    }
    save_file(tuned, tmp_path / "tuned.safetensors", {"format": "pt"})
    table = TaskTable(data=parse_source(str(place / "more"), Path()), templates=("a photo of something {}.",))
    recipe = Recipe(base=parse_source(str(folder), Path()), tasks={"more": table}, eval_tasks=("more",))
    mergecli.evaluate(
        [folder, tmp_path / "tuned.safetensors"], recipe=recipe, predictions=tmp_path / "p.parquet"
    )
    rows = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    chosen = {
        name: [row["prediction"] for row in rows if row["checkpoint"] == name] for name in ("base", "tuned")
    }
    assert chosen == {
        "base": predicted_by_transformers(folder, None, place / "more"),
        "tuned": predicted_by_transformers(folder, tmp_path / "tuned.safetensors", place / "more"),
    }
    assert len(set(chosen["base"])) > 1, "not all images are of one class"


def test_what_is_done_with_a_clip_only_is_refused_with_a_siglip(place, tmp_path):
    folder = make_tiny_dual_encoder(tmp_path / "base")
    table = TaskTable(data=parse_source(str(place / "more"), Path()), templates=("{}",))
    recipe = Recipe(base=parse_source(str(folder), Path()), tasks={"more": table}, eval_tasks=("more",))
    with pytest.raises(InputError) as caught:
        mergecli.evaluate([folder], recipe=recipe, features=tmp_path / "features")
    assert str(caught.value) == (
        f"{folder}: is a model of the kind `siglip`, not a CLIP: "
        "`--features` saves class tokens, which other towers may not have"
    )
    models = {name: parse_source(str(folder), Path()) for name in ("more", "again")}
    routed = tmp_path / "routed.safetensors"
    mergecli.merge(replace(recipe, tuned=models), method="smile", output=routed)
    with pytest.raises(InputError) as caught:
        mergecli.evaluate([routed], recipe=recipe)
    assert str(caught.value) == (
        f"{folder}: is a model of the kind `siglip`, not a CLIP: towers that route are evaluated with CLIPs only"
    )
