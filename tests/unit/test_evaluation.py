from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli import evaluation
from mergecli.checkpoint import TASK_VECTOR
from mergecli.clip import counting
from mergecli.errors import InputError, UsageError
from mergecli.evaluation import evaluate, read_result
from mergecli.recipe import Recipe, TaskTable
from mergecli.sources import parse_source
from tests.tiny import make_image_task, make_tiny_clip

REAL = Path(os.environ.get("MERGECLI_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
TEMPLATES = ("a photo of something {}.", "{}")


@pytest.fixture(autouse=True)
def quiet_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread: for so small a model a second one only waits."""
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "home"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two CLIPs (`base` and `other`), the second's tower, its task vector, and two tasks."""
    folder = tmp_path_factory.mktemp("evaluation")
    make_tiny_clip(folder / "base")
    make_tiny_clip(folder / "other", seed=1)
    make_image_task(folder / "tints")
    make_image_task(folder / "more", test=20, seed=1)
    base, other = (
        {
            k: v
            for k, v in load_file(folder / name / "model.safetensors").items()
            if k.startswith("vision_model.")
        }
        for name in ("base", "other")
    )
    save_file(other, folder / "tower.safetensors", {"kind": "checkpoint", "method": "ties"})
    vector = {name: other[name] - base[name] for name in base}
    save_file(vector, folder / "vector.safetensors", {"kind": TASK_VECTOR})
    return folder


@pytest.fixture
def recipe(place: Path) -> Recipe:
    tables = {
        name: TaskTable(data=parse_source(str(place / name), Path()), templates=TEMPLATES)
        for name in ("tints", "more")
    }
    return Recipe(
        base=parse_source(str(place / "base"), Path()),
        tasks=tables,
        eval_tasks=("tints", "more"),
        batch_size=8,
    )


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


@pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not here")
def test_real_digits_are_counted_as_by_a_plain_loop(place, tmp_path):
    from mergecli.clip.tasks import find

    mnist = find("mnist")
    (tmp_path / "mnist").mkdir()
    shutil.copy(next((REAL / "mnist").glob("test-*.parquet")), tmp_path / "mnist")
    correct, loss = plain(place / "base", place / "other", tmp_path / "mnist", mnist.templates, mnist.classes)
    recipe = Recipe(tasks={"mnist": TaskTable(data=parse_source(str(REAL / "mnist"), Path()))})
    (result,) = evaluate([place / "other"], recipe=recipe, clip=place / "base", tasks=["mnist"])
    assert result.tasks["mnist"].correct == correct
    assert result.tasks["mnist"].loss == pytest.approx(loss, rel=1e-5)


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
    monkeypatch.setattr(counting, "PIXEL_BYTES", 0)
    assert evaluate(towers, recipe=recipe) == together


def test_images_that_threads_process_give_the_same_result(place, recipe, monkeypatch):
    (alone,) = evaluate([place / "other"], recipe=recipe)
    monkeypatch.setattr(counting, "workers_for", lambda clip: 3)
    assert evaluate([place / "other"], recipe=recipe) == (alone,)


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
    assert values["model_info"] == {"trainable_params": 7680, "all_params": 7680, "trainable_percentage": 1.0}
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
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["base.json", "tower.json"]


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
    assert not data.exists()


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
