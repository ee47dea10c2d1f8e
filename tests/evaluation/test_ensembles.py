"""Ensembles: several towers together, of the same forward passes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import mergecli
from mergecli.evaluation.ensembles import KINDS, combined
from mergecli.results.result import read_result
from mergecli.runtime.engines.contract import Engine
from mergecli.runtime.engines.grid import FailedUnitsError
from mergecli.runtime.errors import UsageError

TOWERS = ("base", "tower.safetensors", "tints-tower.safetensors")
WEIGHTS = {"base": 1.0, "tower": 3.0, "tints-tower": 0.0}


def logits(members: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(40, 5, generator=generator) for _ in range(members)]


def softmax(values: np.ndarray) -> np.ndarray:
    exponents = np.exp(values - values.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def naive(kind: str, each: np.ndarray, weights: list[float]) -> np.ndarray:
    """(N, C) probabilities of an ensemble, image by image, of (T, N, C) logits."""
    result = np.empty(each.shape[1:])
    for image in range(each.shape[1]):
        own = each[:, image]
        if kind == "logits":
            result[image] = softmax(own.mean(axis=0))
        elif kind == "probabilities":
            result[image] = softmax(own).mean(axis=0)
        elif kind == "weighted":
            result[image] = softmax(sum(w * row for w, row in zip(weights, own, strict=True)) / sum(weights))
        else:
            chances = softmax(own)
            result[image] = chances[np.argmax(chances.max(axis=1))]
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_equals_its_definition_image_by_image(kind: str) -> None:
    every, weights = logits(), [0.2, 0.5, 0.3]
    want = naive(kind, torch.stack(every).double().numpy(), weights)
    assert np.allclose(combined(kind, every, weights).double().softmax(1).numpy(), want, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_towers_are_that_tower_and_so_is_a_tower_alone(kind: str) -> None:
    (one,) = logits(1)
    for count in (1, 3):
        got = combined(kind, [one] * count, [1 / count] * count)
        assert torch.allclose(got.softmax(1), one.softmax(1), atol=1e-6)
        assert got.argmax(1).equal(one.argmax(1))


def test_a_weight_of_one_is_that_tower_and_probabilities_may_be_tiny() -> None:
    every = logits()
    assert combined("weighted", every, [0.0, 1.0, 0.0]).equal(every[1])
    apart = torch.tensor([[0.0, -2000.0]])
    got = combined("probabilities", [apart, apart], [0.5, 0.5])
    assert torch.allclose(got, torch.tensor([[0.0, -2000.0]]))


def evaluated(place: Path, recipe: object, **given: object) -> tuple[mergecli.Evaluation, ...]:
    return tuple(mergecli.evaluate([place / each for each in TOWERS], recipe=recipe, **given))


def test_rows_of_ensembles_are_of_the_same_forward_passes(place, recipe, tmp_path):
    folder = tmp_path / "out"
    results = evaluated(
        place, recipe, ensemble=KINDS, ensemble_weights=WEIGHTS, output=folder, predictions=tmp_path / "p.parquet"
    )  # fmt: skip
    plain = evaluated(place, recipe)
    assert results[:3] == plain
    assert [each.name for each in results[3:]] == [f"ensemble-{kind}" for kind in KINDS]
    units = {
        json.loads(line)["unit"]: json.loads(line)["key"]
        for line in (folder / "units.jsonl").read_text().splitlines()
    }
    rows = parquet.read_table(tmp_path / "p.parquet").to_pydict()
    for kind, result in zip(KINDS, results[3:], strict=True):
        for task, score in result.tasks.items():
            files = [load_file(folder / ".units" / f"{units[f'{name} on {task}']}.safetensors") for name in WEIGHTS]  # fmt: skip
            labels = files[0]["labels"].numpy()
            each = torch.stack([file["logits"] for file in files]).double().numpy()
            want = naive(kind, each, list(WEIGHTS.values()))
            assert score.correct == (want.argmax(axis=1) == labels).sum()
            chances = want[np.arange(len(labels)), labels]
            assert score.loss == pytest.approx(-np.log(chances).mean(), abs=1e-6)
            batches = [-np.log(chances[start : start + 8]).mean() for start in range(0, len(labels), 8)]
            assert score.loss_batch_mean == pytest.approx(np.mean(batches), abs=1e-6)
            mine = [place for place, name in enumerate(rows["checkpoint"]) if name == result.name and rows["task"][place] == task]  # fmt: skip
            assert [rows["prediction"][place] for place in mine] == want.argmax(axis=1).tolist()
        assert result.is_ensemble
        assert result.checkpoint["method"] == "ensemble"
        assert result.checkpoint["ensemble"] == kind
        assert result.relative_size == pytest.approx(sum(each.relative_size or 0 for each in plain))
        assert list(result.models) == ["base", "tower", "tints-tower"]
        assert read_result(folder / f"ensemble-{kind}.json") == result
    assert results[5].checkpoint["ensemble.weights"] == "base 0.25, tower 0.75, tints-tower 0"
    table = mergecli.report(list(results), against="base", predictions=[tmp_path / "p.parquet"])
    assert [row[0] for row in table.rows][3:] == [f"ensemble-{kind}" for kind in KINDS]
    assert table.kinds == ("base", "merge", "merge", *["model"] * 4)


def test_parts_are_put_together_and_a_second_run_counts_nothing(place, recipe, tmp_path):
    given = {"ensemble": "logits,confidence", "batch_size": 8}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluated(place, recipe, output=whole, **given)
    for number in (2, 1):
        assert evaluated(place, recipe, output=parts, engine=Engine(part=f"{number}/2"), **given) == ()
    evaluated(place, recipe, output=parts, engine=Engine(collect=True), **given)
    assert {file.name: file.read_bytes() for file in parts.glob("*.json")} == {
        file.name: file.read_bytes() for file in whole.glob("*.json")
    }
    assert len(list(parts.glob("*.json"))) == 5
    counted = (parts / "units.jsonl").read_text()
    evaluated(place, recipe, output=parts, ensemble=["logits", "confidence", "probabilities"])
    assert (parts / "units.jsonl").read_text() == counted
    assert (parts / "ensemble-probabilities.json").is_file()


def test_of_a_recipe_the_tuned_models_are_meant_and_the_base_only_if_it_is_named(recipe_file):
    results = mergecli.evaluate(recipe=recipe_file, ensemble="logits", limit=5)
    assert [each.name for each in results] == ["base", "tints", "more", "ensemble-logits"]
    assert list(results[-1].models) == ["tints", "more"]
    (*_, named) = mergecli.evaluate(recipe=recipe_file, only=["base", "more"], ensemble="logits", limit=5)
    assert list(named.models) == ["base", "more"]


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"ensemble": "logit"}, "--ensemble: expected one of logits, probabilities, weighted, confidence, got `logit` (did you mean `logits`?)", ""),
        ({"ensemble": "weighted"}, "--ensemble-weight: `base`, `tower`, `tints-tower`: no weight", "name one for each member: `--ensemble-weight base=0.5`"),
        ({"ensemble": "weighted", "ensemble_weights": {"bass": 1.0}}, "--ensemble-weight: `bass` is no member of the ensemble (did you mean `base`?)", "its members are `base`, `tower`, `tints-tower`"),
        ({"ensemble": "weighted", "ensemble_weights": {**WEIGHTS, "base": -1.0}}, "--ensemble-weight: `base`: expected a number of at least 0, got -1", ""),
        ({"ensemble": "weighted", "ensemble_weights": {**WEIGHTS, "base": math.nan}}, "--ensemble-weight: `base`: expected a number of at least 0, got nan", ""),
        ({"ensemble": "weighted", "ensemble_weights": dict.fromkeys(WEIGHTS, 0.0)}, "--ensemble-weight: all weights are 0", "give at least one member a greater one"),
        ({"ensemble": "weighted", "ensemble_weights": dict.fromkeys(WEIGHTS, 1e308)}, "--ensemble-weight: the sum of the weights is infinite", "give smaller ones"),
        ({"ensemble_weights": WEIGHTS}, "--ensemble-weight: is for the weighted ensemble", "ask for it with `--ensemble weighted`"),
        ({"ensemble": "logits", "output": "r.json"}, "r.json: one file cannot hold 4 results", "name a folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_before_any_image(place, recipe, given, message, hint):
    with pytest.raises(UsageError) as caught:
        evaluated(place, recipe, **given)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_one_checkpoint_is_no_ensemble_and_individual_models_are_none(place, recipe, recipe_file):
    with pytest.raises(UsageError) as caught:
        mergecli.evaluate(place / "base", recipe=recipe, ensemble="logits")
    assert caught.value.message == "--ensemble: expected at least two checkpoints, got `base`"
    with pytest.raises(UsageError) as caught:
        mergecli.evaluate(recipe=recipe_file, individual=True, ensemble="logits")
    assert caught.value.message == (
        "--ensemble: needs every model on every task, and does not go with --individual"
    )


def test_the_plan_has_the_results_of_ensembles(place, recipe_file, tmp_path):
    plan = mergecli.plan(mergecli.evaluate, recipe=recipe_file, ensemble="logits", output=tmp_path / "out")
    written = [each.file for each in plan.work if each.work == "write"]
    assert str(tmp_path / "out" / "ensemble-logits.json") in written


@pytest.mark.slow
def test_a_failed_member_leaves_ensembles_out(place, recipe, tmp_path):
    broken = load_file(place / "tower.safetensors")
    broken = {name: value * math.nan for name, value in broken.items()}
    save_file(broken, tmp_path / "broken.safetensors", {"format": "pt"})
    with pytest.raises(FailedUnitsError) as caught:
        mergecli.evaluate(
            [place / "base", place / "tower.safetensors", tmp_path / "broken.safetensors"],
            recipe=recipe, ensemble="logits", limit=4, engine=Engine(keep_going=True),
        )  # fmt: skip
    assert [each.name for each in caught.value.results] == ["base", "tower"]
