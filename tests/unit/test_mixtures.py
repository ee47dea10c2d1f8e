"""Files of more than one tower: what they are taken for, evaluated, loaded, and refused when their metadata lies."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergecli
from mergecli import evaluation
from mergecli.checkpoint import open_checkpoint
from mergecli.clip import tallies
from mergecli.clip.routes import RouteSums
from mergecli.errors import InputError, UsageError
from mergecli.mixtures import mixture_of
from mergecli.plots import route_maps
from tests.tiny import make_image_task, make_tiny_clip

TASKS = ("one", "two", "three")
TOLD = ("emr", "tall_mask", "tsv_c")
"""Mixtures that must be told the task."""
LEARNT = ("weight_ensembling_moe", "efficient_weight_ensembling_moe")
"""Mixtures with routers."""
ROUTED = ("smile", *LEARNT)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP, three towers and their tasks, a recipe, and a mixture of each kind."""
    folder = tmp_path_factory.mktemp("mixtures")
    make_tiny_clip(folder / "clip")
    whole = load_file(folder / "clip" / "model.safetensors")
    base = {name: each for name, each in whole.items() if name.startswith("vision_model.")}
    for number, task in enumerate(TASKS):
        torch.manual_seed(number)
        tower = {name: each + 0.15 * torch.randn_like(each) for name, each in base.items()}
        save_file(tower, folder / f"{task}.safetensors")
        make_image_task(folder / "images" / task, train=3, test=13, seed=number)
    tables = [f'[tasks.{task}]\ndata = "images/{task}"\ntemplates = ["a {{}} picture"]\n' for task in TASKS]
    tuned = [f'{task} = "{task}.safetensors"\n' for task in TASKS]
    (folder / "r.toml").write_text(f'base = "clip"\n[tuned]\n{"".join(tuned)}{"".join(tables)}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGECLI_HOME", str(folder / "home"))
        for method in (*TOLD, *ROUTED):
            settings = {"steps": 0, "router_spread": 1.0} if method in LEARNT else {}
            output = folder / f"{method}.safetensors"
            mergecli.merge(folder / "r.toml", method=method, settings=settings, output=output)
    return folder


@pytest.fixture(autouse=True)
def quiet(own_store: None) -> None:
    """One thread, and an empty store."""


def counts(place: Path, checkpoint: object, **more: Any) -> dict[str, int]:
    return {task: correct for task, (correct, _) in scores(place, checkpoint, **more).items()}


def scores(place: Path, checkpoint: object, **more: Any) -> dict[str, tuple[int, float]]:
    """Task -> right answers and loss, which tells towers apart that guess alike."""
    (result,) = mergecli.evaluate({"m": str(checkpoint)}, recipe=place / "r.toml", **more)
    return {task: (score.correct, score.loss) for task, score in result.tasks.items()}


# what they are


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


# evaluated


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
    monkeypatch.setattr(tallies, "tallies_of", refuse)
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


@pytest.mark.parametrize("method", LEARNT)
def test_a_batch_that_shares_its_weights_is_not_cut_into_pieces(
    place: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = place / f"{method}.safetensors"
    sample, batch = (scores(place, file, routing=each, cache=False) for each in ("sample", "batch"))
    monkeypatch.setattr("mergecli.clip.seats.PIECE", 1)
    monkeypatch.setattr("mergecli.clip.seats.FEWEST", 2)
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
    files = {name: place / f"{name}.safetensors" for name in ("smile", *LEARNT, "emr", "one")}
    mergecli.evaluate(files, recipe=place / "r.toml", routing="batch", limit=3, output=tmp_path / "out")
    read = {name: evaluation.read_result(tmp_path / "out" / f"{name}.json") for name in files}
    told = {name: each.checkpoint.get("routing") for name, each in read.items()}
    assert told == {"smile": "sample", **dict.fromkeys(LEARNT, "batch"), "emr": "task", "one": None}
    one = sum(each.nbytes for each in load_file(files["one"]).values())
    for name, file in files.items():
        size = sum(each.nbytes for each in load_file(file).values())
        assert (read[name].bytes, read[name].relative_size) == (size, size / one)
    table = mergecli.report([read[LEARNT[0]], read["one"]])
    assert [column.name for column in table.columns[:4]] == ["model", "method", "size", "routing"]
    assert [row[3] for row in table.rows] == ["batch", None]
    assert f"| {read[LEARNT[0]].relative_size:.2f} | batch |" in table.text("md")
    assert "| 1.00 | - |" in table.text("md")
    assert f">{read[LEARNT[0]].relative_size:.2f}</td>" in table.text("html")
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
    old = evaluation.read_result(tmp_path / "old.json")
    assert (old.bytes, old.relative_size) == (None, None)
    values["model_info"]["relative_size"] = "large"
    (tmp_path / "bad.json").write_text(json.dumps(values))
    with pytest.raises(
        InputError, match=r"bad.json: is not a result: `model_info.relative_size`: expected float"
    ):
        evaluation.read_result(tmp_path / "bad.json")


# routes


def table(file: Path) -> dict[tuple[str, str], list[float]]:
    heads, *rows = list(csv.reader(file.read_text().splitlines()))
    assert heads == ["task", "layer", *TASKS]
    return {(row[0], row[1]): [float(cell) for cell in row[2:]] for row in rows}


@pytest.fixture
def by_hand(place: Path) -> dict[tuple[str, str], list[float]]:
    """(task, layer) -> mean routes, of a tower loaded by the pool and shown all images of a task at once."""
    pool = mergecli.ModelPool({"base": place / "clip", "m": place / "smile.safetensors"})
    tower: Any = pool.load_model("m")
    processor, found = pool.load_processor(), dict[tuple[str, str], list[float]]()
    images = mergecli.ModelPool(place / "r.toml")
    for task in TASKS:
        data = images.load_test_dataset(task)
        pictures = [data[index][0] for index in range(len(data))]
        with torch.inference_mode():
            tower(pixel_values=processor.image_processor(pictures, return_tensors="pt")["pixel_values"])
        routes: dict[str, Tensor] = tower.mergecli_routing.routes()
        found |= {(task, layer): each.mean(0).tolist() for layer, each in routes.items()}
    return found


@pytest.mark.parametrize(("size", "threads"), [(128, 1), (5, 2)])
def test_routes_are_the_means_over_each_tasks_images(
    place: Path, tmp_path: Path, by_hand: dict[tuple[str, str], list[float]], size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("mergecli.clip.seats.PIECE", 4 * 5 * 32 * 2)  # two images at a time
    torch.set_num_threads(threads)
    files = {
        name: place / f"{file}.safetensors" for name, file in (("a", "smile"), ("b", "emr"), ("c", "smile"))
    }
    mergecli.evaluate(files, recipe=place / "r.toml", batch_size=size, routes=tmp_path / "routes")
    assert sorted(file.name for file in (tmp_path / "routes").iterdir()) == [
        "a.csv",
        "a.png",
        "c.csv",
        "c.png",
    ]
    for name in "ac":
        got = table(tmp_path / "routes" / f"{name}.csv")
        assert got.keys() == by_hand.keys()
        for key, weights in by_hand.items():
            assert got[key] == pytest.approx(weights, abs=1e-5)
            assert sum(got[key]) == pytest.approx(1, abs=1e-5)


def test_a_row_that_a_batch_shares_counts_for_each_of_its_images() -> None:
    sums = RouteSums()
    sums.add({"layer": torch.tensor([[1.0, 0.0]])}, 3)
    sums.add({"layer": torch.tensor([[0.0, 1.0]])}, 1)
    each = RouteSums()
    each.add({"layer": torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])}, 4)
    assert sums.means() == each.means() == {"layer": (0.75, 0.25)}


def test_routes_of_an_evaluation_that_was_interrupted_are_counted_anew(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = place / "smile.safetensors"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="stop"):
        patch.setattr(evaluation, "write_text", stop)
        counts(place, file, output=tmp_path / "r.json")
    shown: list[str] = []

    def tell(what: str, done: int, _: int) -> None:
        shown.append(f"{what} {done}")

    counts(place, file, routes=tmp_path / "routes", progress=tell)
    assert len(table(tmp_path / "routes" / "m.csv")) == 3 * 12
    assert "one 13" in shown


def refuse(*_: object) -> None:
    pytest.fail("an image was looked at")


def stop(*_: object) -> None:
    raise OSError("stop")


def test_routes_of_checkpoints_that_do_not_route_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none of the checkpoints holds a tower that routes"):
        counts(place, place / "emr.safetensors", routes=tmp_path / "routes")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"):
        counts(place, place / "smile.safetensors", routes=tmp_path / "file")


def test_a_routing_of_checkpoints_that_do_not_route_is_refused(place: Path) -> None:
    for method in ("emr", "smile"):
        with pytest.raises(UsageError, match=r"--routing: none .* routes batches otherwise than") as raised:
            scores(place, place / f"{method}.safetensors", routing="batch")
        assert raised.value.hint == "`weight_ensembling_moe` and `efficient_weight_ensembling_moe` make some"


def test_a_picture_of_many_experts_and_layers_has_a_readable_size(tmp_path: Path) -> None:
    from PIL import Image

    experts = [f"task-{number}" for number in range(9)]
    layers = {f"encoder.layers.{layer}.{part}": [0.05] * 9 for layer in range(24) for part in ("fc1", "fc2")}
    route_maps(experts, dict.fromkeys(experts, layers), tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert max(picture.size) <= 25 * 200
    route_maps(["a", "b"], {"b": {"layer": [-0.5, 0.0]}}, tmp_path / "q.png")


# loaded


@pytest.mark.parametrize("method", ROUTED)
def test_a_pool_loads_a_tower_that_routes_and_the_tower_of_a_task(
    place: Path, tmp_path: Path, method: str
) -> None:
    from transformers import CLIPVisionModel

    pool = mergecli.ModelPool(
        {
            "base": place / "clip",
            "m": place / f"{method}.safetensors",
            "t": f"{place}/{method}.safetensors#two",
        }
    )
    torch.manual_seed(0)
    pixels = torch.randn(3, 3, 16, 16)
    tower, clip = pool.load_model("m"), pool.load_clip_model("m")
    assert isinstance(tower, CLIPVisionModel)
    with torch.inference_mode():
        want = tower(pixel_values=pixels).pooler_output
        torch.testing.assert_close(clip.vision_model(pixel_values=pixels).pooler_output, want)
        assert not pool.load_model()(pixel_values=pixels).pooler_output.allclose(want)
    with pytest.raises(UsageError, match="a tower that routes cannot be saved"):
        pool.save_model(tower, tmp_path / "t.safetensors")
    pool.save_model(pool.load_model("t"), tmp_path / "t.safetensors")
    got = mergecli.info(tmp_path / "t.safetensors").digest
    assert got == mergecli.info(f"{place}/{method}.safetensors#two").digest


@pytest.mark.parametrize("load", ["load_model", "load_clip_model"])
def test_a_pool_asks_for_the_task_of_a_mixture_that_needs_it(place: Path, load: str) -> None:
    pool = mergecli.ModelPool({"base": place / "clip", "m": place / "emr.safetensors"})
    with pytest.raises(InputError, match="holds towers for one, two, three") as raised:
        getattr(pool, load)("m")
    assert "emr.safetensors#one" in raised.value.hint


# metadata that lies

Tensors = dict[str, Tensor]
Lie = Callable[[dict[str, str], Tensors], object]
NAME = "vision_model.post_layernorm.weight"
LIES: dict[str, tuple[str, Lie]] = {
    "an unknown method": ("unknown method `emmr`", lambda about, _: about.update(method="emmr")),
    "no mixture's method": ("not that of a mixture", lambda about, _: about.update(method="average")),
    "one task's own method": (
        "not that of a mixture",
        lambda about, _: about.update(method="tall_mask", settings_table='{"task": "one"}'),
    ),
    "no method": ("not that of a mixture", lambda about, _: about.pop("method")),
    "settings that are no table": (
        "not that of a mixture",
        lambda about, _: about.update(settings_table="[1]"),
    ),
    "settings of a wrong type": (
        "mask_threshold",
        lambda about, _: about.update(method="tall_mask", settings_table='{"mask_threshold": "much"}'),
    ),
    "unknown settings": ("depth", lambda about, _: about.update(settings_table='{"depth": 1}')),
    "settings nested without end": (
        "not that of a mixture",
        lambda about, _: about.update(settings_table="[" * 100_000),
    ),
    "no tasks": ("not that of a mixture", lambda about, _: about.pop("tasks")),
    "an empty list of tasks": ("not that of a mixture", lambda about, _: about.update(tasks="[]")),
    "tasks that are no list": ("not that of a mixture", lambda about, _: about.update(tasks='{"one": 1}')),
    "tasks that are no names": ("", lambda about, _: about.update(tasks="[1, [2], null]")),
    "a task twice": ("not that of a mixture", lambda about, _: about.update(tasks='["one", "two", "one"]')),
    "more tasks than rows": (
        "has shape",
        lambda about, _: about.update(tasks='["one", "two", "three", "four"]'),
    ),
    "another mixture's method": ("lacks tensor `summed.", lambda about, _: about.update(method="tall_mask")),
    "a tensor is missing": (
        f"lacks tensor `masks.{NAME}`",
        lambda _, tensors: tensors.pop(f"masks.{NAME}"),
    ),
    "a shared tensor is missing": (
        f"has an extra tensor `masks.{NAME}`",
        lambda _, tensors: tensors.pop(NAME),
    ),
    "an extra tensor": (
        "has an extra tensor `masks.else`",
        lambda _, tensors: tensors.update({"masks.else": torch.zeros(1)}),
    ),
    "an extra tensor of no known kind": (
        "else`",
        lambda _, tensors: tensors.update({"else": torch.zeros(1)}),
    ),
    "a wrong shape": (
        f"`unified.{NAME}` has shape",
        lambda _, tensors: tensors.update({f"unified.{NAME}": torch.zeros(3)}),
    ),
    "a wrong dtype": (
        f"`masks.{NAME}` has dtype I16",
        lambda _, tensors: tensors.update({f"masks.{NAME}": tensors[f"masks.{NAME}"].short()}),
    ),
    "whole numbers for weights": (f"{NAME}`", lambda _, tensors: tensors.update({NAME: tensors[NAME].int()})),
    "no tensors but the masks": (
        "lacks",
        lambda _, tensors: [tensors.pop(name) for name in list(tensors) if not name.startswith("masks.")],
    ),
    "called a checkpoint": ("has an extra tensor `masks.", lambda about, _: about.update(kind="checkpoint")),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_whose_metadata_lies_is_refused_by_name(place: Path, tmp_path: Path, lie: str) -> None:
    what, change = LIES[lie]
    with safe_open(place / "emr.safetensors", "pt") as file:
        metadata: dict[str, str] = file.metadata()
    tensors = load_file(place / "emr.safetensors")
    change(metadata, tensors)
    save_file(tensors, tmp_path / "liar.safetensors", metadata)
    with pytest.raises(InputError, match=r"liar\.safetensors: ") as raised:
        counts(place, tmp_path / "liar.safetensors", limit=3)
    assert what in raised.value.message
    assert raised.value.hint


WEIGHT = "vision_model.encoder.layers.0.mlp.fc1.weight"
BITS = f"masks.{WEIGHT}"
OWN_LIES: dict[str, tuple[str, str, Lie]] = {
    f"{method}: {lie}": (method, what, change)
    for method, *lies in (
        ("tall_mask", ("a part is missing", f"lacks tensor `summed.{NAME}`", f"summed.{NAME}")),
        ("tsv_c", ("a factor is missing", f"lacks tensor `right.{WEIGHT}`", f"right.{WEIGHT}")),
        ("smile", ("a factor is missing", f"lacks tensor `right.{WEIGHT}`", f"right.{WEIGHT}")),
        *(
            (each, ("an expert is missing", f"lacks tensor `experts.{WEIGHT}`", f"experts.{WEIGHT}"))
            for each in LEARNT
        ),
    )
    for lie, what, gone in lies
    for change in [lambda _, tensors, gone=gone: tensors.pop(gone)]
}
CONTRADICTIONS: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "every bit is set": (
        rf"`{BITS}`: expected at most 52 bits that are set, one for a value, got 512",
        lambda tensors: tensors[BITS].fill_(255),
    ),
    "no bit is set": (
        rf"`{BITS}`: expected a bit for each value that is not 0, got 0",
        lambda tensors: tensors[BITS].zero_(),
    ),
    "one bit too few in one row": (
        rf"`{BITS}`: expected a bit for each value that is not 0, got \d\d",
        lambda tensors: tensors[BITS][1].__setitem__(int(tensors[BITS][1].nonzero()[0]), 0),
    ),
}


@pytest.mark.parametrize("lie", OWN_LIES)
def test_a_file_that_lacks_a_part_of_its_method_is_refused_by_name(
    place: Path, tmp_path: Path, lie: str
) -> None:
    method, what, change = OWN_LIES[lie]
    file = changed(place, tmp_path, method, change)
    for attempt in (lambda: counts(place, file, limit=3), lambda: mergecli.info(file)):
        with pytest.raises(InputError, match=r"liar\.safetensors: is not what its metadata says") as raised:
            attempt()
        assert what in raised.value.message


@pytest.mark.parametrize("lie", CONTRADICTIONS)
def test_masks_that_are_not_those_of_the_values_are_refused_by_name(
    place: Path, tmp_path: Path, lie: str
) -> None:
    what, change = CONTRADICTIONS[lie]
    file = changed(place, tmp_path, LEARNT[1], lambda _, tensors: change(tensors))
    pool = mergecli.ModelPool({"base": place / "clip", "m": file})
    for attempt in (
        lambda: counts(place, file, limit=3),
        lambda: mergecli.info(f"{file}#two"),
        lambda: pool.load_model("m"),
    ):
        with pytest.raises(InputError, match=rf"liar\.safetensors: {what}\n") as raised:
            attempt()
        assert raised.value.hint


def test_a_file_of_ours_of_a_kind_that_is_not_known_is_refused_as_a_model_and_shown(
    place: Path, tmp_path: Path
) -> None:
    file = changed(place, tmp_path, "emr", lambda about, _: about.update(kind="banana"))
    with pytest.raises(InputError, match=r"liar\.safetensors: its kind: expected .*, got `banana`") as raised:
        counts(place, file)
    assert "a later version" in raised.value.hint
    found = mergecli.info(file)
    assert (found.kind, found.is_model) == ("banana", False)
    save_file(load_file(place / "one.safetensors"), file, {"kind": "banana"})  # another program's
    assert mergecli.info(file).is_model
    assert counts(place, file, limit=3) == counts(place, place / "one.safetensors", limit=3)


def test_what_another_command_left_out_of_a_checkpoint_does_not_keep_it_from_evaluation(
    place: Path, tmp_path: Path
) -> None:
    about = {"mergecli": "0", "kind": "checkpoint", "left_out": '["logit_scale"]'}
    save_file(load_file(place / "one.safetensors"), tmp_path / "m.safetensors", about)
    assert counts(place, tmp_path / "m.safetensors") == counts(place, place / "one.safetensors")


def changed(place: Path, folder: Path, method: str, change: Lie) -> Path:
    """The mixture of a method, of which something is no longer true."""
    with safe_open(place / f"{method}.safetensors", "pt") as file:
        metadata: dict[str, str] = file.metadata()
    tensors = load_file(place / f"{method}.safetensors")
    change(metadata, tensors)
    save_file(tensors, folder / "liar.safetensors", metadata)
    return folder / "liar.safetensors"


# what cannot be written


@pytest.mark.parametrize("name", ["masks.a.weight", "unified.layer.weight", "rescalers.a", "router.a"])
def test_names_that_a_mixture_has_for_its_own_tensors_are_refused_before_anything_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergecli.models.Models.map", refuse)
    for file in ("base", "a"):
        save_file({name: torch.ones(2), "layer.weight": torch.ones(2)}, tmp_path / f"{file}.safetensors")
    models, base = {"a": tmp_path / "a.safetensors"}, tmp_path / "base.safetensors"
    with pytest.raises(InputError, match=rf"base\.safetensors: `{name}`: expected names that") as raised:
        mergecli.merge(models, base=base, method="emr", output=tmp_path / "m.safetensors")
    assert "`masks.`" in raised.value.hint
    monkeypatch.undo()
    mergecli.merge(models, base=base, method="average", output=tmp_path / "m.safetensors")


@pytest.mark.parametrize("method", ["smile"])
def test_models_without_a_layer_that_the_method_has_experts_for_are_refused(
    tmp_path: Path, method: str
) -> None:
    for file in ("base", "a"):
        save_file({"layer.weight": torch.ones(2, 2)}, tmp_path / f"{file}.safetensors")
    models, base = {"a": tmp_path / "a.safetensors"}, tmp_path / "base.safetensors"
    with pytest.raises(InputError, match=rf"expected tensors that `{method}` has experts for, got none"):
        mergecli.merge(models, base=base, method=method, output=tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_experts_of_full_rank_take_no_more_room_than_models(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    mergecli.merge(place / "r.toml", method="smile", settings={"rank": 9999}, output=output)
    size = float(mergecli.info(output).mixture["relative size"].split()[0])
    assert size < 1 + len(TASKS) * 1.1
    with open_checkpoint(output) as stored:
        tower = mixture_of(stored).of_task("two")
        assert_near(tower.read(WEIGHT), load_file(place / "two.safetensors")[WEIGHT])


@pytest.mark.parametrize("method", LEARNT)
def test_one_task_with_all_of_its_entries_and_a_factor_of_one_is_that_tasks_model(
    place: Path, tmp_path: Path, method: str
) -> None:
    settings: dict[str, Any] = {"start": 1.0, "steps": 0, "router_spread": 0.0}
    settings |= {"density": 1.0} if method == LEARNT[1] else {}
    recipe, output = tmp_path / "r.toml", tmp_path / "m.safetensors"
    text = f'base = "{place}/clip"\n[tuned]\none = "{place}/one.safetensors"\n[tasks.one]\n'
    recipe.write_text(f'{text}data = "{place}/images/one"\ntemplates = ["a {{}} picture"]\n')
    mergecli.merge(recipe, method=method, settings=settings, output=output)
    want = load_file(place / "one.safetensors")
    with open_checkpoint(output) as stored:
        tower = mixture_of(stored).of_task("one")
        for name, value in want.items():
            assert_near(tower.read(name), value)
    got, alone = (scores(place, each, tasks=["one"])["one"] for each in (output, place / "one.safetensors"))
    assert got == (alone[0], pytest.approx(alone[1], abs=1e-5))


def assert_near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "tower"),
    [
        ("emr", None),
        (LEARNT[0], "that task's MLPs; the rest is shared by all tasks"),
        (LEARNT[1], "that task's MLPs, pruned; the rest is shared by all tasks"),
    ],
)
def test_info_of_a_task_says_what_its_tower_is_and_what_its_file_would_take(
    place: Path, tmp_path: Path, method: str, tower: str | None
) -> None:
    settings = {"steps": 0} if method in LEARNT else {}
    output = tmp_path / "m.safetensors"
    mergecli.merge(
        place / "r.toml", method=method, settings=settings, changes=["dtype=float16"], output=output
    )
    found = mergecli.info(f"{output}#one")
    assert found.metadata.get("tower") == tower
    assert (found.files, found.size) == (0, 2 * found.parameters)
    assert set(found.dtypes) == {"F32"}
    (result,) = mergecli.evaluate(f"{output}#one", recipe=place / "r.toml", tasks=["one"], limit=3)
    one = sum(each.nbytes for each in load_file(place / "one.safetensors").values())
    assert (result.bytes, result.relative_size) == (one / 2, 0.5)


def test_a_plain_tower_called_a_mixture_is_refused(place: Path, tmp_path: Path) -> None:
    with safe_open(place / "emr.safetensors", "pt") as file:
        metadata: dict[str, str] = file.metadata()
    save_file(load_file(place / "one.safetensors"), tmp_path / "liar.safetensors", metadata)
    for attempt in (
        lambda: counts(place, tmp_path / "liar.safetensors"),
        lambda: mergecli.info(tmp_path / "liar.safetensors"),
    ):
        with pytest.raises(
            InputError, match=r"liar\.safetensors: is not what its metadata says, `emr` of 3 tasks"
        ):
            attempt()


def test_a_task_of_a_file_with_one_tower_is_refused(place: Path) -> None:
    with pytest.raises(InputError, match="the file holds one tower"):
        mergecli.info(f"{place}/one.safetensors#one")


def test_a_dtype_of_a_whole_mixture_is_refused_and_of_one_of_its_towers_is_not(
    place: Path, tmp_path: Path
) -> None:
    def recipe(source: str) -> Path:
        path = tmp_path / "r.toml"
        tuned = f'one = {{ source = "{place}/{source}", dtype = "float16" }}\ntwo = "{place}/two.safetensors"'
        path.write_text(f'base = "{place}/clip"\n[tuned]\n{tuned}\n')
        return path

    merged = mergecli.merge(
        recipe("emr.safetensors#one"), method="average", output=tmp_path / "m.safetensors"
    )
    assert merged.tasks == ("one", "two")
    with pytest.raises(InputError, match="holds several towers, to which no `dtype` applies") as raised:
        mergecli.merge(recipe("emr.safetensors"), method="average", output=tmp_path / "n.safetensors")
    assert raised.value.hint == "name one of them, `FILE#TASK`, or leave it out"
