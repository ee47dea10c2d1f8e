"""Fisher merging."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergecli.clip.heads import logits, zero_shot_head
from mergecli.merging.learning.measure import measure
from tests.conftest import assert_same
from tests.methods.reference._vision_model import Called
from tests.methods.reference.average import average
from tests.methods.reference.fisher import fisher, measured_fisher
from tests.support.image_zoo import CLASSES, FEW, TEMPLATES, Zoo, measured_merge
from tests.support.statistics_in_memory import LINEAR, Given, combine, fishers, some

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.mark.parametrize("per_example", [False, True])
def test_the_fisher_information_is_the_squared_gradient_that_torch_func_gives(
    zoo: Zoo, tmp_path: Path, per_example: bool
) -> None:
    settings = {**FEW, "per_example": per_example}
    done = measure(zoo.recipe, method="fisher", settings=settings, output=tmp_path / "s")
    for task, path in done.paths.items():
        clip = zoo.clip()
        head = zero_shot_head(clip, CLASSES[task], TEMPLATES)
        called = Called(clip.tower)
        called.load_state_dict(zoo.tuned[task])
        batches = zoo.pixels(task, 20, shuffle=False).split(7)
        want = measured_fisher(called, partial(logits, clip, head), batches, per_example)
        got = load_file(path)
        for name, value in want.items():
            largest = float(value.max())
            # gradients differ by rounding, which squares and sums of 20 keep small
            assert torch.allclose(got[f"{name}.fisher"], value, rtol=1e-4, atol=1e-6 * largest + 1e-12), name
        squares = [float(got[f"{name}.fisher"].double().square().sum()) for name in sorted(want)]
        assert got["squares"].tolist() == pytest.approx(squares, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"normalize": False}, {"minimal": 0.01}])
def test_fisher_is_the_weighted_mean_of_whole_models(
    zoo: Zoo, tmp_path: Path, settings: dict[str, Any]
) -> None:
    got = measured_merge(zoo, "fisher", tmp_path / "s", **settings)
    informations = [
        {
            name.removesuffix(".fisher"): value
            for name, value in load_file(tmp_path / "s" / f"{task}.safetensors").items()
            if name != "squares"
        }
        for task in zoo.tuned
    ]
    assert_same(got, fisher(list(zoo.tuned.values()), informations, **settings), atol=1e-6)
    assert not torch.allclose(got[LINEAR], average(list(zoo.tuned.values()))[LINEAR], atol=1e-3)


def test_equal_fishers_give_the_average() -> None:
    rows = some(3, 6, 4)
    got = combine("fisher", fishers(*[some(6, 4).square()] * 3), rows)
    assert torch.allclose(got, rows.mean(0), atol=1e-7)


def test_fisher_without_any_information_gives_the_average() -> None:
    rows = some(3, 6, 4)
    got = combine("fisher", fishers(*[torch.zeros(6, 4)] * 3), rows, minimal=0)
    assert torch.allclose(got, rows.mean(0), atol=1e-7)


def test_one_model_and_the_same_model_twice_are_given_back() -> None:
    rows, information = some(1, 6, 4), some(6, 4, seed=1).square()
    assert combine("fisher", fishers(information), rows).equal(rows[0])
    two = fishers(information, some(6, 4, seed=2).square())
    assert combine("fisher", two, rows.repeat(2, 1, 1)).equal(rows[0])


def test_the_order_of_tasks_matters_only_to_the_last_bits() -> None:
    rows, given = some(3, 6, 4), fishers(*(some(40, 4, seed=seed)[:6].square() for seed in (1, 2, 3)))
    turned = Given(*reversed(given.files))
    assert torch.allclose(combine("fisher", given, rows), combine("fisher", turned, rows.flip(0)), atol=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (1, 1), (4, 3), (2, 3, 2, 2)])
def test_fisher_merges_a_group_of_any_shape(shape: tuple[int, ...]) -> None:
    rows = some(3, *shape)
    got = combine("fisher", fishers(*(some(*shape, seed=seed).square() for seed in (1, 2, 3))), rows)
    assert got.shape == shape
    assert got.dtype == torch.float32
    assert bool(got.isfinite().all())
