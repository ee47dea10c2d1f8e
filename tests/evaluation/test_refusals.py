"""What is refused before the first image, and what is never replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mergecli.data.tasks import TaskTable
from mergecli.evaluation.evaluate import counting, evaluate
from mergecli.evaluation.evaluate import evaluate as evaluation
from mergecli.recipe.schema import Recipe
from mergecli.results.result import read_result
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.sources import parse_source


def test_nothing_is_computed_before_every_input_is_known_to_fit(place, recipe, tmp_path, monkeypatch):
    weights = load_file(place / "tower.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "post" not in name}, tmp_path / "bad.safetensors"
    )
    monkeypatch.setattr(counting, "count", lambda *_: pytest.fail("a forward pass began"))
    with pytest.raises(InputError, match=r"lacks tensor `vision_model\.post_layernorm\.bias`"):
        evaluate([place / "base", tmp_path / "bad.safetensors"], recipe=recipe)
    with pytest.raises(InputError, match=r"gone\.safetensors: no such file"):
        evaluate([place / "base", tmp_path / "gone.safetensors"], recipe=recipe)
    gone = {"gone": TaskTable(data=parse_source(str(tmp_path / "gone"), Path()), templates=("{}",))}
    with pytest.raises(InputError, match="gone: no such file or folder"):
        evaluate(
            [place / "base"],
            recipe=Recipe(base=recipe.base, tasks={**recipe.tasks, **gone}),
            tasks=["tints", "gone"],
        )


def test_weights_that_are_not_numbers_are_named_and_nothing_is_written(place, recipe, tmp_path):
    weights = load_file(place / "tower.safetensors")
    weights["vision_model.post_layernorm.bias"][0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match=r"nan\.safetensors: gives NaN or infinite logits on task `tints`"):
        evaluate([tmp_path / "nan.safetensors"], recipe=recipe, output=tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clip": None, "tasks": ["mnist"]}, "no CLIP to evaluate with"),
        ({"tasks": None}, "no tasks to evaluate on"),
        ({"tasks": ["mnsit"]}, "unknown task `mnsit`"),
        ({"device": "abacus"}, "device `abacus`"),
        ({"dtype": "float31"}, r"dtype: expected one of .*, got `float31` \(did you mean `float32`\?\)"),
        ({"limit": 0}, "limit: expected a whole number of at least 1, got 0"),
        ({"workers": 0}, "workers: expected a whole number of at least 1, got 0"),
        ({"corruption": "contrats"}, r"unknown corruption `contrats` \(did you mean `contrast`\?\)"),
        ({"corruption": "contrast", "severity": 6}, "expected a severity from 1 to 5, got 6"),
        ({"cache_size": "large"}, "cache size: expected a size"),
        ({"features": "base/config.json"}, "is a file, a folder was expected"),
        ({"checkpoints": []}, "no checkpoint to evaluate"),
        (
            {"checkpoints": ["a/x.safetensors", "b/x.safetensors"], "output": "out"},
            "two results would be called `x`",
        ),
        ({"checkpoints": ["base", "other"], "output": "r.json"}, "one file cannot hold 2 results"),
        ({"output": "base/model.json"}, None),
    ],
)
def test_wrong_arguments_are_refused(place, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "other"):
        shutil.copytree(place / name, tmp_path / name)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(place / "tower.safetensors", tmp_path / name / "x.safetensors")
    arguments = {"checkpoints": ["base"], "clip": "base", "tasks": ["digits"], **given}
    checkpoints = arguments.pop("checkpoints")
    if message is None:
        evaluate(checkpoints, **arguments)
        return
    with pytest.raises(UsageError, match=message):
        evaluate(checkpoints, **arguments)


def test_predictions_never_replace_a_checkpoint(place, recipe, tmp_path):
    file = Path(shutil.copy(place / "tower.safetensors", tmp_path))
    with pytest.raises(UsageError, match=r"expected a \.parquet file"):
        evaluate([file], recipe=recipe, predictions=file)
    data = place / "tints" / "predictions.parquet"
    with pytest.raises(UsageError, match="lies in the data of `tints`, which is never written to"):
        evaluate([file], recipe=recipe, tasks=["tints"], predictions=data)
    with pytest.raises(UsageError, match="lies in the data of `tints`, which is never written to"):
        evaluate([file], recipe=recipe, tasks=["tints"], features=place / "tints")
    assert not data.exists()


def test_features_never_replace_a_checkpoint_that_is_called_like_a_task(place, recipe, tmp_path):
    file = Path(shutil.copy(place / "tower.safetensors", tmp_path / "tints.safetensors"))
    with pytest.raises(UsageError, match="would replace an input"):
        evaluate([file], recipe=recipe, features=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v.update(schema="mergecli.eval/9"),
            "`schema`: expected `mergecli.eval/1`, got 'mergecli.eval/9'",
        ),
        (lambda v: v.pop("clip"), "lacks the key `clip`"),
        (lambda v: v["tasks"]["tints"].pop("loss"), "lacks the key `tasks.tints.loss`"),
        (
            lambda v: v["tasks"]["tints"].update(correct="many"),
            "`tasks.tints.correct`: expected int, got 'many'",
        ),
        (lambda v: v["tasks"]["tints"].update(correct=13), "do not agree"),
        (lambda v: v["tasks"].clear(), "names no tasks"),
        (lambda v: v.update(tasks=[]), "`tasks`: expected a table"),
    ],
)
def test_a_file_that_is_no_result_is_refused(place, recipe, tmp_path, change, message):
    (result,) = evaluation.evaluate([place / "base"], recipe=recipe, tasks=["tints"])
    values = json.loads(result.to_json())
    change(values)
    (tmp_path / "r.json").write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        read_result(tmp_path / "r.json")
    assert message in caught.value.message


def test_text_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(InputError, match=r"r\.json: is not JSON"):
        read_result(tmp_path / "r.json")
    with pytest.raises(InputError, match="no such result"):
        read_result(tmp_path / "gone.json")
