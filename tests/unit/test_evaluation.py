from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecli import evaluation
from mergecli.checkpoint import TASK_VECTOR, open_checkpoint
from mergecli.clip import counting, heads, model, tallies, tasks
from mergecli.clip.images import load_images
from mergecli.clip.selection import balanced
from mergecli.errors import InputError, UsageError
from mergecli.evaluation import evaluate, read_result
from mergecli.recipe import Recipe, TaskTable
from mergecli.sources import parse_source
from tests.tiny import make_image_task, make_tiny_clip

REAL = Path(os.environ.get("MERGECLI_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
TEMPLATES = ("a photo of something {}.", "{}")
OTHERS = ("emnist_letters", "gtsrb", "eurosat", "dtd10", "cifar10", "fashion_mnist")


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
@pytest.mark.parametrize(
    ("name", "built_in"),
    [
        ("mnist", True),
        ("sign_digits", False),
        *[pytest.param(name, name == "emnist_letters", marks=pytest.mark.slow) for name in OTHERS],
    ],
)
def test_real_images_are_counted_as_by_a_plain_loop(place, tmp_path, name, built_in):
    found = tasks.find(name) if built_in else None
    templates = found.templates if found else TEMPLATES[1:]
    (tmp_path / "data").mkdir()
    shutil.copy(next((REAL / name).glob("test-*.parquet")), tmp_path / "data")
    correct, loss = plain(
        place / "base", place / "other", tmp_path / "data", templates, found.classes if found else None
    )
    table = TaskTable(data=parse_source(str(REAL / name), Path()), templates=None if found else templates)
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
    monkeypatch.setattr(tallies, "PIXEL_BYTES", 0)
    assert evaluate(towers, recipe=recipe) == together


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_towers_that_are_shown_images_at_once_get_what_they_get_in_turn(place, recipe, monkeypatch, threads):
    towers = [place / name for name in ("base", "tower.safetensors", "vector.safetensors")]
    in_turn = evaluate(towers, recipe=recipe)
    torch.set_num_threads(threads)
    for room in (1 << 30, 0):
        monkeypatch.setattr(tallies, "PIXEL_BYTES", room)
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


@pytest.mark.parametrize("limit", range(1, 12))
def test_a_balanced_choice_is_even_and_part_of_every_larger_one(limit):
    labels = [0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2]
    chosen = balanced(labels, limit)
    counts = Counter(labels[number] for number in chosen)
    assert len(set(chosen)) == limit
    assert set(chosen) < set(balanced(labels, limit + 1))
    if limit <= 6:
        assert max(counts.values()) - min(counts[label] for label in range(3)) <= 1


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

    def small(clip, head, pixel_values, correction):
        seen.append(len(pixel_values))
        if len(pixel_values) > 3:
            raise torch.cuda.OutOfMemoryError("too much")
        return real(clip, head, pixel_values, correction)

    real = heads.logits
    monkeypatch.setattr(heads, "logits", small)
    (pieces,) = evaluate([place / "other"], recipe=recipe, fresh=True)
    for name, score in pieces.tasks.items():
        assert score.correct == whole.tasks[name].correct
        assert score.loss_batch_mean == pytest.approx(whole.tasks[name].loss_batch_mean, rel=1e-5)
    assert [size for size in seen if size > 3] == [8, 4, 8, 4]


def test_features_are_the_class_token_after_each_layer(place, recipe, tmp_path):
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    evaluate([place / "other"], recipe=recipe, tasks=["tints"], features=tmp_path / "f", limit=9)
    found = load_file(tmp_path / "f" / "tints.safetensors")
    assert sorted(found) == ["labels", "layer_00", "layer_01"]
    model = CLIPVisionModel.from_pretrained(place / "other").eval()
    images = load_images(tasks.find("tints", recipe))
    numbers = balanced(images.labels, 9)
    assert found["labels"].tolist() == [images.labels[number] for number in numbers]
    batch = CLIPImageProcessorPil.from_pretrained(place / "other")(
        [images[number][0] for number in numbers], return_tensors="pt"
    )
    with torch.inference_mode():
        states = model(**batch, output_hidden_states=True).hidden_states
    for layer in range(2):
        assert torch.allclose(found[f"layer_0{layer}"], states[layer + 1][:, 0], atol=1e-5)


def test_features_of_several_checkpoints_have_a_folder_each(place, recipe, tmp_path):
    evaluate([place / "base", place / "tower.safetensors"], recipe=recipe, features=tmp_path / "f")
    names = sorted(str(file.relative_to(tmp_path / "f")) for file in (tmp_path / "f").rglob("*.safetensors"))
    assert names == [f"{name}/{task}.safetensors" for name in ("base", "tower") for task in ("more", "tints")]
    with open_checkpoint(tmp_path / "f" / "tower" / "tints.safetensors") as stored:
        about = stored.metadata
    assert (about["kind"], about["task"], about["split"]) == ("features", "tints", "test")


def counted(monkeypatch: pytest.MonkeyPatch, stop_at: str | None = None) -> list[str]:
    """The tasks that are counted from now on; at `stop_at` Ctrl-C is pressed."""
    seen: list[str] = []
    real = counting.count

    def count(seats, work, parts):
        if work.task == stop_at:
            raise KeyboardInterrupt
        seen.append(f"{work.task} {len(work.checkpoints)}")
        return real(seats, work, parts)

    monkeypatch.setattr(counting, "count", count)
    return seen


def test_an_interrupted_evaluation_goes_on_where_it_was(place, recipe, tmp_path, monkeypatch):
    towers = [place / "base", place / "tower.safetensors"]
    given = {"recipe": recipe, "output": tmp_path / "out", "predictions": tmp_path / "p.parquet"}
    evaluate(towers, **given | {"output": tmp_path / "want", "predictions": tmp_path / "want.parquet"})
    assert list((tmp_path / "home" / "cache" / "results").iterdir()) == []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, stop_at="more")
        evaluate(towers, **given)
    assert len(list((tmp_path / "home" / "cache" / "results").iterdir())) == 2
    seen = counted(monkeypatch)
    evaluate(towers, **given)
    assert seen == ["more 2"]
    for name in ("base.json", "tower.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "want" / name).read_bytes()
    assert (tmp_path / "p.parquet").read_bytes() == (tmp_path / "want.parquet").read_bytes()
    assert list((tmp_path / "home" / "cache" / "results").iterdir()) == []
    evaluate(towers, **given)
    assert seen == ["more 2", "tints 2", "more 2"]


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


def test_features_that_were_saved_before_an_interruption_are_not_made_again(
    place, recipe, tmp_path, monkeypatch
):
    given = {"recipe": recipe, "features": tmp_path / "f"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, stop_at="more")
        evaluate(place / "other", **given)
    assert [file.name for file in (tmp_path / "f").iterdir()] == ["tints.safetensors"]
    seen = counted(monkeypatch)
    evaluate(place / "other", **given)
    assert seen == ["more 1"]
    assert len(list((tmp_path / "f").iterdir())) == 2


def test_a_damaged_count_of_an_interrupted_evaluation_is_made_anew(place, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, stop_at="more")
        evaluate(place / "other", recipe=recipe)
    (file,) = (tmp_path / "home" / "cache" / "results").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    seen = counted(monkeypatch)
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
