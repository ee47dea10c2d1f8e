"""Which experts images were sent to; and mixtures loaded into Python."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergecli
from mergecli.evaluation import evaluate as evaluation
from mergecli.evaluation.routes import RouteSums
from mergecli.results.plots import route_maps
from mergecli.runtime.errors import InputError, UsageError
from tests.support.mixture_scores import ROUTED, TASKS, counts, scores


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
    monkeypatch.setattr("mergecli.clip.pixels.MICRO_BATCH", 4 * 5 * 32 * 2)  # two images at a time
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


def test_towers_that_route_by_layers_of_their_own_follow_each_other(place: Path, tmp_path: Path) -> None:
    """When a task begins, the layers of the last tower of the task before are still installed."""
    files = {name: place / f"{name}.safetensors" for name in ROUTED}
    results = mergecli.evaluate(files, recipe=place / "r.toml", routes=tmp_path / "routes")
    got = {
        result.name: {task: (score.correct, score.loss) for task, score in result.tasks.items()}
        for result in results
    }
    assert got == {name: scores(place, file) for name, file in files.items()}


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


def stop(*_: object) -> None:
    raise OSError("stop")


def test_routes_of_checkpoints_that_do_not_route_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none of the checkpoints holds a tower that routes") as raised:
        counts(place, place / "emr.safetensors", routes=tmp_path / "routes")
    assert raised.value.hint == (
        "methods that make some: `efficient_weight_ensembling_moe`, `esm_plus_plus`, `mass`, `rank_one_moe`, `smile`, "
        "`weight_ensembling_moe`; and with `method.router=sim` `emr`, `tall_mask`, `tsv_c`"
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"):
        counts(place, place / "smile.safetensors", routes=tmp_path / "file")


def test_a_routing_of_checkpoints_that_do_not_route_is_refused(place: Path) -> None:
    for method in ("emr", "smile"):
        with pytest.raises(UsageError, match=r"--routing: none .* routes batches otherwise than") as raised:
            scores(place, place / f"{method}.safetensors", routing="batch")
        assert raised.value.hint == (
            "methods that make some: `efficient_weight_ensembling_moe`, `esm_plus_plus`, `rank_one_moe`, "
            "`weight_ensembling_moe`"
        )


def test_a_picture_of_many_experts_and_layers_has_a_readable_size(tmp_path: Path) -> None:
    from PIL import Image

    experts = [f"task-{number}" for number in range(9)]
    layers = {f"encoder.layers.{layer}.{part}": [0.05] * 9 for layer in range(24) for part in ("fc1", "fc2")}
    route_maps(experts, dict.fromkeys(experts, layers), tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert max(picture.size) <= 25 * 200
    route_maps(["a", "b"], {"b": {"layer": [-0.5, 0.0]}}, tmp_path / "q.png")


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
