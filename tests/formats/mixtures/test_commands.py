"""Files of more than one tower: what they are taken for, and evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mergecli
from mergecli.evaluation import counting
from mergecli.formats.mixture import mixture_of
from mergecli.results.result import read_result
from mergecli.runtime.errors import InputError
from mergecli.storage.checkpoint import open_checkpoint
from tests.support.mixture_scores import LEARNED, ROUTED, TASKS, TOLD, counts, refuse, scores


@pytest.mark.parametrize(
    ("method", "told"), [("emr", "needs the task"), *((method, "routes") for method in ROUTED)]
)
def test_info_tells_the_tasks_how_the_task_is_told_and_the_size(place: Path, method: str, told: str) -> None:
    found = mergecli.info(place / f"{method}.safetensors")
    stored = load_file(place / f"{method}.safetensors")
    shared = load_file(place / "one.safetensors")
    size = {
        name: sum(each.nbytes for each in file.values()) for name, file in (("all", stored), ("one", shared))
    }
    assert found.kind == "mixture"
    assert found.mixture == {
        "tasks": "one, two, three",
        "routing": told,
        "relative size": f"{size['all'] / size['one']:.2f} of one tower",
    }


def test_info_of_a_task_is_its_tower(place: Path) -> None:
    mergecli.merge(
        {"one": f"{place}/emr.safetensors#one"},
        method="average",
        base=place / "clip",
        output=place / "same.safetensors",
    )
    found = mergecli.info(f"{place}/emr.safetensors#one")
    assert (found.kind, found.mixture) == ("checkpoint", {})
    assert found.digest == mergecli.info(place / "same.safetensors").digest
    whole = mergecli.info(place / "emr.safetensors")
    assert (found.metadata["recipe"], found.inputs) == (whole.metadata["recipe"], whole.inputs)


def test_a_task_of_a_mixture_is_merged_like_any_tower(place: Path, tmp_path: Path) -> None:
    models = {"a": f"{place}/emr.safetensors#one", "b": place / "two.safetensors"}
    mergecli.merge(models, method="average", base=place / "clip", output=tmp_path / "m.safetensors")
    with open_checkpoint(place / "emr.safetensors") as stored:
        tower = mixture_of(stored).of_task("one")
        first = {name: tower.read(name) for name in tower.entries}
    other, got = load_file(place / "two.safetensors"), load_file(tmp_path / "m.safetensors")
    for name, value in got.items():
        torch.testing.assert_close(value, (first[name] + other[name]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["emr", *ROUTED])
def test_a_mixture_where_one_tower_is_needed_is_one_clear_error(
    place: Path, method: str, tmp_path: Path
) -> None:
    file, other, clip = place / f"{method}.safetensors", place / "one.safetensors", place / "clip"
    attempts: list[Callable[[], object]] = [
        lambda: mergecli.merge(
            {"a": file, "b": other}, method="average", base=clip, output=tmp_path / "m.safetensors"
        ),
        lambda: mergecli.merge({"b": other}, method="average", base=file, output=tmp_path / "m.safetensors"),
        lambda: mergecli.taskvector(file, base=clip, output=tmp_path / "v.safetensors"),
        lambda: mergecli.cos_sim({"b": other}, base=file),
    ]
    for attempt in attempts:
        with pytest.raises(
            InputError, match=r"holds towers for one, two, three, and one tower is needed"
        ) as raised:
            attempt()
        assert raised.value.hint == f"name one as `{file}#one`"
    assert list(tmp_path.glob("*.safetensors")) == []


@pytest.mark.parametrize("method", ["emr", *ROUTED])
def test_cos_sim_takes_the_tower_of_each_task(place: Path, method: str) -> None:
    found = mergecli.cos_sim(
        {"m": place / f"{method}.safetensors", "two": place / "two.safetensors"}, base=place / "clip"
    )
    assert found.names == ("m#one", "m#two", "m#three", "two")
    single = mergecli.cos_sim(
        {"a": f"{place}/{method}.safetensors#two", "b": place / "two.safetensors"}, base=place / "clip"
    )
    assert found.cosines[1][3] == pytest.approx(single.cosines[0][1], abs=1e-12)


@pytest.mark.parametrize("method", TOLD)
def test_a_mixture_that_is_told_the_task_scores_as_each_tasks_tower_by_itself(
    place: Path, method: str
) -> None:
    file = place / f"{method}.safetensors"
    whole = scores(place, file)
    for task in TASKS:
        assert scores(place, f"{file}#{task}", tasks=[task])[task] == whole[task]
    assert scores(place, f"{file}#one", tasks=["two"])["two"] != whole["two"]


def test_a_task_that_a_mixture_lacks_is_an_error_before_the_first_image(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "count", refuse)
    models = {task: place / f"{task}.safetensors" for task in ("one", "two")}
    mergecli.merge(models, base=place / "clip", method="emr", output=tmp_path / "emr.safetensors")
    with pytest.raises(InputError, match=r"emr.safetensors: has no tower for `three`") as raised:
        counts(place, tmp_path / "emr.safetensors")
    assert raised.value.hint == "it holds towers for one, two"


@pytest.mark.parametrize("method", ROUTED)
def test_towers_that_route_do_not_look_at_the_rest_of_the_batch(place: Path, method: str) -> None:
    file = place / f"{method}.safetensors"
    want = scores(place, file)
    others = [scores(place, file, batch_size=size) for size in (1, 5, 128)]
    for other in (*others, scores(place, file, tasks=TASKS[::-1])):
        for task, (correct, loss) in want.items():
            assert other[task] == (correct, pytest.approx(loss, abs=1e-5))
    assert scores(place, f"{file}#one")["one"][1] != pytest.approx(want["one"][1], abs=1e-5)


@pytest.mark.parametrize("method", LEARNED)
def test_a_batch_that_shares_its_weights_is_not_cut_into_pieces(
    place: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = place / f"{method}.safetensors"
    sample, batch = (scores(place, file, routing=each, cache=False) for each in ("sample", "batch"))
    monkeypatch.setattr("mergecli.clip.pixels.MICRO_BATCH", 1)
    monkeypatch.setattr("mergecli.clip.pixels.FEWEST", 2)
    for routing, want in (("sample", sample), ("batch", batch)):
        for task, (correct, loss) in scores(place, file, routing=routing, cache=False).items():
            assert (correct, loss) == (want[task][0], pytest.approx(want[task][1], abs=1e-5))
    one_by_one = scores(place, file, routing="batch", batch_size=1, cache=False)
    for task, (_, loss) in sample.items():
        assert abs(batch[task][1] - loss) > 1e-3, "the images of a batch share their weights"
        assert one_by_one[task][1] == pytest.approx(loss, abs=1e-5), "a batch of one is an image by itself"


def test_results_say_how_the_task_was_told_and_how_large_the_checkpoint_is(
    place: Path, tmp_path: Path
) -> None:
    files = {name: place / f"{name}.safetensors" for name in ("smile", *LEARNED, "emr", "one")}
    mergecli.evaluate(files, recipe=place / "r.toml", routing="batch", limit=3, output=tmp_path / "out")
    read = {name: read_result(tmp_path / "out" / f"{name}.json") for name in files}
    told = {name: each.checkpoint.get("routing") for name, each in read.items()}
    assert told == {"smile": "sample", **dict.fromkeys(LEARNED, "batch"), "emr": "task", "one": None}
    one = sum(each.nbytes for each in load_file(files["one"]).values())
    for name, file in files.items():
        size = sum(each.nbytes for each in load_file(file).values())
        assert (read[name].bytes, read[name].relative_size) == (size, size / one)
    table = mergecli.report([read[LEARNED[0]], read["one"]])
    assert [column.name for column in table.columns[:4]] == ["model", "method", "size", "routing"]
    assert [row[3] for row in table.rows] == ["batch", None]
    assert f"| {read[LEARNED[0]].relative_size:.2f} | batch |" in table.text("md")
    assert "| 1.00 | - |" in table.text("md")
    assert f">{read[LEARNED[0]].relative_size:.2f}</td>" in table.text("html")
    assert "the task leaks" in table.text("md")
    assert "leaks" not in mergecli.report([read["smile"], read["one"]]).text("md")
    plain = mergecli.report([read["one"]])
    assert [column.name for column in plain.columns[:3]] == ["model", "method", "one"]


def test_models_each_on_its_own_task_are_as_large_as_all_together(place: Path) -> None:
    (result,) = mergecli.evaluate(recipe=place / "r.toml", individual=True, limit=3)
    assert result.relative_size == 3
    assert "size" not in [column.name for column in mergecli.report([result]).columns]


def test_results_of_before_have_no_size(place: Path, tmp_path: Path) -> None:
    mergecli.evaluate(place / "one.safetensors", recipe=place / "r.toml", limit=3, output=tmp_path / "r.json")
    values = json.loads((tmp_path / "r.json").read_text())
    del values["model_info"]["bytes"], values["model_info"]["relative_size"]
    (tmp_path / "old.json").write_text(json.dumps(values))
    old = read_result(tmp_path / "old.json")
    assert (old.bytes, old.relative_size) == (None, None)
    values["model_info"]["relative_size"] = "large"
    (tmp_path / "bad.json").write_text(json.dumps(values))
    with pytest.raises(
        InputError, match=r"bad.json: is not a result: `model_info.relative_size`: expected a number"
    ):
        read_result(tmp_path / "bad.json")
