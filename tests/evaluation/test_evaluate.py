"""Counts, losses and what results say, against a plain loop; what is refused before the first image, and never replaced."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergecli
from mergecli.clip import heads
from mergecli.data import tasks
from mergecli.data.tasks import TaskTable
from mergecli.evaluation import counting, scoring
from mergecli.evaluation.evaluate import evaluate
from mergecli.recipe.reading import recipe_of
from mergecli.recipe.schema import Recipe
from mergecli.results.result import read_result
from mergecli.runtime.errors import InputError, MergecliWarning, UsageError
from mergecli.storage.sources import parse_source
from tests.support.tiny_clip import CLASSES

REAL = Path(os.environ.get("MERGECLI_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
TEMPLATES = ("a photo of something {}.", "{}")
OTHERS = ("emnist_letters", "gtsrb", "eurosat", "dtd10", "cifar10", "fashion_mnist")


def plain(
    folder: Path, tower: Path, data: Path, templates: tuple[str, ...], classes: tuple[str, ...] | None = None
) -> tuple[int, float]:
    """Correct answers and mean loss by transformers and datasets alone, one image at a time."""
    import datasets
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    model, tokenizer = (
        CLIPModel.from_pretrained(folder, dtype=torch.float32),
        CLIPTokenizer.from_pretrained(folder),
    )
    model.vision_model.load_state_dict(
        CLIPModel.from_pretrained(tower, dtype=torch.float32).vision_model.state_dict()
    )
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    test = datasets.Dataset.from_parquet(
        str(next(data.glob("test-*.parquet"))), cache_dir=str(data.parent / "plain")
    )
    head = []
    for name in classes or test.features["label"].names:
        batch = tokenizer(
            [template.format(name) for template in templates], padding=True, return_tensors="pt"
        )
        text = model.get_text_features(**batch).pooler_output
        mean = (text / text.norm(dim=-1, keepdim=True)).mean(dim=0)
        head.append(mean / mean.norm())
    correct, loss = 0, 0.0
    with torch.inference_mode():
        for row in test:
            image = model.get_image_features(
                **processor(row["image"].convert("RGB"), return_tensors="pt")
            ).pooler_output
            scores = (
                model.logit_scale.exp() * (image / image.norm(dim=-1, keepdim=True)) @ torch.stack(head).T
            )
            correct += int(scores.argmax() == row["label"])
            loss += float(torch.nn.functional.cross_entropy(scores, torch.tensor([row["label"]])))
    return correct, loss / len(test)


def test_counts_and_losses_are_those_of_a_plain_loop(place, recipe, tmp_path):
    data = shutil.copytree(place / "more", tmp_path / "more")
    for tower in ("base", "other"):
        correct, loss = plain(place / "base", place / tower, data, TEMPLATES)
        (result,) = evaluate([place / tower], recipe=recipe, tasks=["more"])
        score = result.tasks["more"]
        assert (score.correct, score.images, score.accuracy) == (correct, 20, correct / 20)
        assert score.loss == pytest.approx(loss, rel=1e-5)


def thinned(file: Path, folder: Path, images: int) -> None:
    """Some of the images of a Parquet file, evenly drawn, in row groups of 64."""
    from pyarrow import parquet

    table = parquet.read_table(file)
    folder.mkdir()
    some = table.take([number * len(table) // images for number in range(images)])
    parquet.write_table(some, folder / file.name, row_group_size=64)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not here")
@pytest.mark.parametrize(
    ("name", "built_in"),
    [
        ("mnist", True),
        ("sign_digits", False),
        *[(name, name == "emnist_letters") for name in OTHERS],
    ],
)
def test_real_images_are_counted_as_by_a_plain_loop(place, tmp_path, name, built_in):
    found = tasks.find(name) if built_in else None
    templates = found.templates if found else TEMPLATES[1:]
    thinned(next((REAL / name).glob("test-*.parquet")), tmp_path / "data", 150)
    correct, loss = plain(
        place / "base", place / "other", tmp_path / "data", templates, found.classes if found else None
    )
    table = TaskTable(
        data=parse_source(str(tmp_path / "data"), Path()), templates=None if found else templates
    )
    task = name if built_in else f"real-{name}"
    recipe = Recipe(tasks={task: table})
    for given in ({"workers": 2}, {"batch_size": 77}, {"cache": False, "workers": 1, "batch_size": 400}):
        (result,) = evaluate(place / "other", recipe=recipe, clip=place / "base", tasks=[task], **given)
        assert result.tasks[task].correct == correct
        assert result.tasks[task].loss == pytest.approx(loss, rel=1e-5)


def test_tower_file_whole_clip_and_task_vector_score_alike(place, recipe):
    names = ("other", "tower.safetensors", "vector.safetensors")
    whole, tower, vector = evaluate([place / name for name in names], recipe=recipe)
    assert tower.tasks == whole.tasks
    assert tower.checkpoint["digest"] == whole.checkpoint["digest"]
    assert [score.correct for score in vector.tasks.values()] == [
        score.correct for score in whole.tasks.values()
    ]


def test_several_together_get_what_each_gets_alone(place, recipe, monkeypatch):
    towers = [place / "base", place / "tower.safetensors"]
    together = evaluate(towers, recipe=recipe)
    assert together == tuple(evaluate([tower], recipe=recipe)[0] for tower in towers)
    assert together[0].tasks != together[1].tasks
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 0)
    assert evaluate(towers, recipe=recipe) == together


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_towers_that_are_shown_images_at_once_get_what_they_get_in_turn(place, recipe, monkeypatch, threads):
    towers = [place / name for name in ("base", "tower.safetensors", "vector.safetensors")]
    in_turn = evaluate(towers, recipe=recipe)
    torch.set_num_threads(threads)
    for room in (1 << 30, 0):
        monkeypatch.setattr(scoring, "CHUNK_BYTES", room)
        at_once = evaluate(towers, recipe=recipe, cache=False)
        for one, other in zip(at_once, in_turn, strict=True):
            assert {name: (score.correct, score.images) for name, score in one.tasks.items()} == {
                name: (score.correct, score.images) for name, score in other.tasks.items()
            }
            assert one.average.loss == pytest.approx(other.average.loss, rel=1e-5)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_cache_workers_and_batch_size_change_no_count(place, recipe, workers, batch_size):
    (alone,) = evaluate([place / "other"], recipe=recipe, cache=False)
    for _ in ("decoded", "from the cache"):
        (again,) = evaluate([place / "other"], recipe=recipe, batch_size=batch_size, workers=workers)
        for name, score in alone.tasks.items():
            assert again.tasks[name].correct == score.correct
            assert again.tasks[name].loss == pytest.approx(score.loss, rel=1e-5)


def test_the_short_last_batch_weighs_too_much_only_in_the_batch_mean(place, recipe):
    (result,) = evaluate([place / "tower.safetensors"], recipe=recipe, tasks=["tints"])  # batches of 8 and 4
    (whole,) = evaluate([place / "tower.safetensors"], recipe=recipe, tasks=["tints"], batch_size=100)
    score, exact = result.tasks["tints"], whole.tasks["tints"]
    assert exact.loss_batch_mean == pytest.approx(exact.loss)
    assert score.loss == pytest.approx(exact.loss, rel=1e-5)
    assert abs(score.loss_batch_mean - score.loss) > 1e-4


def test_the_file_says_what_was_evaluated_and_no_folder(place, recipe, tmp_path):
    (result,) = evaluate([place / "tower.safetensors"], recipe=recipe, output=tmp_path / "new" / "r.json")
    text = (tmp_path / "new" / "r.json").read_text()
    values = json.loads(text)
    assert str(place) not in text
    assert values["schema"] == "mergecli.eval/1"
    assert values["checkpoint"] | {"digest": ""} == {
        "name": "tower", "path": "tower.safetensors", "digest": "", "kind": "checkpoint", "method": "ties",
    }  # fmt: skip
    assert values["model_info"] == {
        "trainable_params": 7680, "all_params": 7680, "trainable_percentage": 1.0, "bytes": 30720, "relative_size": 1.0,
    }  # fmt: skip
    assert list(values["tasks"]) == ["tints", "more"]
    assert values["average"]["accuracy"] == sum(s["accuracy"] for s in values["tasks"].values()) / 2
    assert values["tasks"]["tints"]["data"]["source"] == "tints"
    assert read_result(tmp_path / "new" / "r.json") == result


def test_one_path_and_one_string_of_tasks_are_enough(place, recipe):
    (result,) = evaluate(place / "base", recipe=recipe, tasks="more,tints")
    assert list(result.tasks) == ["more", "tints"]


def test_the_base_s_own_tower_is_known_as_pretrained(place, recipe):
    base, other = evaluate([place / "base", place / "other"], recipe=recipe, tasks=["tints"])
    assert (base.checkpoint["method"], other.checkpoint["method"]) == ("pretrained", None)


def test_the_same_evaluation_gives_the_same_bytes(place, recipe, tmp_path):
    for name in ("a.json", "b.json"):
        evaluate([place / "other"], recipe=recipe, output=tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_several_results_go_into_a_folder(place, recipe, tmp_path):
    evaluate(
        [place / "base", place / "tower.safetensors"], recipe=recipe, tasks=["tints"], output=tmp_path / "out"
    )
    assert sorted(file.name for file in (tmp_path / "out").glob("*.json")) == ["base.json", "tower.json"]


def test_predictions_are_a_row_for_each_image(place, recipe, tmp_path):
    from pyarrow import parquet

    file = tmp_path / "p.parquet"
    (result,) = evaluate([place / "other"], recipe=recipe, predictions=file)
    rows = parquet.read_table(file).to_pylist()
    assert len(rows) == 32
    assert list(rows[0]) == ["checkpoint", "task", "index", "label", "prediction", "probability"]
    right = [row for row in rows if row["task"] == "more" and row["label"] == row["prediction"]]
    assert len(right) == result.tasks["more"].correct
    assert all(1 / 3 <= row["probability"] <= 1 for row in rows)


def test_another_split_is_evaluated_when_asked_for(place, recipe):
    (result,) = evaluate([place / "other"], recipe=recipe, tasks=["tints"], split="train")
    assert (result.tasks["tints"].images, result.tasks["tints"].split) == (30, "train")


def test_a_limit_takes_as_many_of_each_class_always_the_same_and_says_so(place, recipe, tmp_path):
    file = tmp_path / "p.parquet"
    (result,) = evaluate([place / "other"], recipe=recipe, tasks=["more"], limit=7, predictions=file)
    (whole,) = evaluate([place / "other"], recipe=recipe, tasks=["more"], predictions=tmp_path / "w.parquet")
    score = result.tasks["more"]
    assert (score.images, score.limit) == (7, 7)
    assert json.loads(result.to_json())["tasks"]["more"]["limit"] == 7
    rows, every = (parquet_rows(each) for each in (file, tmp_path / "w.parquet"))
    assert sorted(Counter(row["label"] for row in rows).values()) == [2, 2, 3]
    assert [row["index"] for row in rows] == sorted({row["index"] for row in rows})
    for row in rows:
        alike = every[row["index"]]
        assert (row["label"], row["prediction"]) == (alike["label"], alike["prediction"])
    (again,) = evaluate([place / "other"], recipe=recipe, tasks=["more"], limit=7, cache=False)
    assert again == result
    assert whole.tasks["more"].limit is None
    assert evaluate([place / "other"], recipe=recipe, tasks=["more"], limit=20)[0] == whole


def parquet_rows(file: Path) -> list[dict[str, object]]:
    from pyarrow import parquet

    return parquet.read_table(file).to_pylist()


def test_a_corruption_and_its_severity_stand_in_the_result(place, recipe):
    (clean,) = evaluate([place / "other"], recipe=recipe, tasks=["more"])
    (result,) = evaluate([place / "other"], recipe=recipe, tasks=["more"], corruption="contrast", severity=4)
    score = result.tasks["more"]
    assert (score.split, score.corruption, score.severity) == ("test", "contrast", 4)
    assert score.loss != clean.tasks["more"].loss
    assert not {"corruption", "severity", "limit"} & set(json.loads(clean.to_json())["tasks"]["more"])


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_a_smaller_dtype_is_said_and_comes_close(place, recipe, dtype, error):
    (exact,) = evaluate([place / "other"], recipe=recipe)
    (result,) = evaluate([place / "other"], recipe=recipe, dtype=dtype)
    assert (exact.dtype, result.dtype) == ("float32", dtype)
    for name, score in result.tasks.items():
        assert score.loss == pytest.approx(exact.tasks[name].loss, rel=error)
        assert score.loss != exact.tasks[name].loss


def test_a_device_that_is_too_small_for_a_batch_gets_it_in_pieces(place, recipe, monkeypatch):
    (whole,) = evaluate([place / "other"], recipe=recipe)
    seen: list[int] = []

    def small(clip, head, pixel_values, *more):
        seen.append(len(pixel_values))
        if len(pixel_values) > 3:
            raise torch.cuda.OutOfMemoryError("too much")
        return real(clip, head, pixel_values, *more)

    real = heads.logits
    monkeypatch.setattr(heads, "logits", small)
    (pieces,) = evaluate([place / "other"], recipe=recipe, fresh=True)
    for name, score in pieces.tasks.items():
        assert score.correct == whole.tasks[name].correct
        assert score.loss_batch_mean == pytest.approx(whole.tasks[name].loss_batch_mean, rel=1e-5)
    assert [size for size in seen if size > 3] == [8, 4, 8, 4]


def test_results_of_older_versions_are_read(place, recipe, tmp_path):
    (result,) = evaluate([place / "base"], recipe=recipe, limit=5)
    values = json.loads(result.to_json())
    for score in values["tasks"].values():
        del score["limit"]
    (tmp_path / "r.json").write_text(json.dumps(values))
    assert read_result(tmp_path / "r.json").tasks["tints"].limit is None
    (tmp_path / "n.json").write_text(result.to_json())
    assert read_result(tmp_path / "n.json") == result


def test_progress_counts_every_image_of_every_checkpoint(place, recipe):
    seen: list[tuple[str, int, int]] = []
    evaluate([place / "base", place / "other"], recipe=recipe, progress=lambda *told: seen.append(told))
    assert [told for told in seen if told[1] == told[2]] == [("tints", 24, 24), ("more", 40, 40)]


def test_without_tasks_those_of_the_tuned_models_are_taken(place):
    tuned = {"digits": parse_source("toy:digits", Path())}
    recipe = Recipe(base=parse_source(str(place / "base"), Path()), tuned=tuned)
    (result,) = evaluate([place / "base"], recipe=recipe)
    assert list(result.tasks) == ["digits"]
    assert result.tasks["digits"].images == 450


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
    with pytest.raises(InputError, match=r"gone \(task `gone`\): no such file or folder"):
        evaluate(
            [place / "base"],
            recipe=Recipe(base=recipe.base, tasks={**recipe.tasks, **gone}),
            tasks=["tints", "gone"],
        )


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_features_that_are_not_numbers_or_too_large_are_named_and_nothing_is_written(
    place, recipe, tmp_path, value
):
    weights = load_file(place / "tower.safetensors")
    weights["vision_model.post_layernorm.bias"][0] = value
    save_file(weights, tmp_path / "nan.safetensors")
    message = r"nan\.safetensors: gives NaN or infinite logits on task `tints`\nhint: .* `--precision` is too narrow"
    with pytest.raises(InputError, match=message):
        evaluate([tmp_path / "nan.safetensors"], recipe=recipe, output=tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clip": None, "tasks": ["mnist"]}, "there is no CLIP to evaluate with"),
        ({"tasks": None}, "there are no tasks to evaluate on"),
        ({"tasks": ["mnsit"]}, "unknown task `mnsit`"),
        ({"device": "abacus"}, "device: expected .*, got `abacus`"),
        ({"dtype": "float31"}, r"precision: expected one of .*, got `float31` \(did you mean `float32`\?\)"),
        ({"limit": 0}, "limit: expected a whole number, at least 1, got 0"),
        ({"limit": 10.0}, "limit: expected a whole number, at least 1, got 10.0"),
        ({"batch_size": True}, "batch_size: expected a whole number, at least 1, got True"),
        (
            {"dtype": torch.float16},
            r"precision: expected one of .*, got `torch.float16` \(did you mean `float16`\?\)",
        ),
        ({"workers": 0}, "workers: expected a whole number, at least 1, got 0"),
        ({"corruption": "contrats"}, r"unknown corruption `contrats` \(did you mean `contrast`\?\)"),
        ({"corruption": "contrast", "severity": 6}, "expected a severity from 1 to 5, got 6"),
        ({"cache_size": "large"}, "cache size: expected a size"),
        ({"features": "base/config.json"}, "is a file, a folder was expected"),
        ({"checkpoints": []}, "there is no checkpoint to evaluate"),
        (
            {"checkpoints": ["a/x.safetensors", "b/x.safetensors"], "output": "out"},
            "two results would be called `x`\nhint: write `NAME=SOURCE`, each with a name of its own",
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
            '`schema`: expected `mergecli.eval/1`, got "mergecli.eval/9"',
        ),
        (lambda v: v.pop("clip"), "`clip`: expected a table, got nothing"),
        (lambda v: v["tasks"]["tints"].pop("loss"), "`tasks.tints.loss`: expected a number, got nothing"),
        (
            lambda v: v["tasks"]["tints"].update(correct="many"),
            '`tasks.tints.correct`: expected a whole number, at least 0, got "many"',
        ),
        (lambda v: v["tasks"]["tints"].update(correct=13), "do not agree"),
        (lambda v: v["tasks"].clear(), "names no tasks"),
        (lambda v: v.update(tasks=[]), "`tasks`: expected a table"),
    ],
)
def test_a_file_that_is_no_result_is_refused(place, recipe, tmp_path, change, message):
    (result,) = evaluate([place / "base"], recipe=recipe, tasks=["tints"])
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


def test_a_model_that_may_have_been_trained_on_the_test_images_is_warned_of_before_they_are_counted(
    place, recipe, tmp_path
):
    (tmp_path / "DTDVal").mkdir()
    old = shutil.copy(place / "tower.safetensors", tmp_path / "DTDVal" / "nonlinear_finetuned.safetensors")
    table = TaskTable(data=recipe.tasks["tints"].data, templates=TEMPLATES, classes=CLASSES)
    known = replace(recipe, tasks={**recipe.tasks, "dtd": table})
    told: list[str] = []
    two = {"old": old, "new": place / "tower.safetensors"}
    with pytest.warns(MergecliWarning) as warned:
        evaluate(two, recipe=known, tasks=["dtd"], progress=lambda *_: told.append(str(len(warned))))
    assert told[0] == "1"
    assert [str(each.message) for each in warned] == [
        "`old`: may have been trained on test images of `dtd`: the versions of the TALL pool before 13 December 2024 were "
        "(nik-dim/tall_masks, issue 1)"
    ]  # fmt: skip
    own = {"dtd": place / "tower.safetensors", "tints": old}
    evaluate(own, recipe=known, tasks=["dtd", "tints"], individual=True)
    evaluate({"old": old}, recipe=known, tasks=["dtd"], split="train")
    evaluate({"old": old}, recipe=known, tasks=["tints"])


def test_results_have_the_pool_that_the_recipe_of_the_models_says(place, tmp_path):
    known = recipe_of(place / "recipe.toml", changes=["pool=mine"])
    mergecli.merge(known, method="average", output=tmp_path / "merged.safetensors")
    found = {each.name: each.pool for each in evaluate(recipe=known, limit=3, ensemble="logits")}
    assert found == {"base": None, "tints": "mine", "more": "mine", "ensemble-logits": "mine"}
    (own,) = evaluate(recipe=known, limit=3, individual=True)
    other = recipe_of(place / "recipe.toml", changes=["pool=yours"])
    two = [tmp_path / "merged.safetensors", place / "more-tower.safetensors"]
    assert own.pool == "mine"
    with pytest.warns(
        MergecliWarning, match="averages of models of different pools do not compare: `mine`: `me"
    ):
        assert [each.pool for each in evaluate(two, recipe=other, limit=3)] == ["mine", "yours"]
