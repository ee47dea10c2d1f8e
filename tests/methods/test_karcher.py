"""The Karcher mean."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.conftest import Weights, World, assert_same, random_weights
from tests.methods.reference.karcher import karcher
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("steps", [0, 3, 30])
def test_karcher_equals_the_mean_by_exponential_and_logarithmic_maps(
    world: World, steps: int, far: bool
) -> None:
    """Of models around one base, and of models that have little to do with each other."""
    models = [random_weights(seed) for seed in (11, 12, 13)] if far else list(world.tuned.values())
    got = merged(with_models(world, world.base, *models), "karcher", steps=steps)
    assert_same(got, with_integers(karcher(models, steps), world), atol=2e-6)


def test_karcher_of_two_models_of_one_norm_is_slerp_at_the_middle(world: World) -> None:
    models = [
        {
            name: value / value.norm()
            for name, value in random_weights(seed).items()
            if name in ("conv", "zz.long")
        }
        for seed in (11, 12)
    ]
    two = with_models(world, models[0], *models)
    assert_same(merged(two, "karcher"), merged(two, "slerp"), atol=1e-6)


def test_karcher_of_equal_models_and_of_one_is_that_model(world: World) -> None:
    assert_same(merged(world, "karcher", ["t2"]), world.tuned["t2"], atol=1e-6)
    same = with_models(world, world.base, *[world.tuned["t1"]] * 3)
    assert_same(merged(same, "karcher"), world.tuned["t1"], atol=1e-6)


def test_karcher_where_there_is_no_direction(world: World) -> None:
    zero, one = torch.zeros(2), torch.tensor([0.0, 4])
    for models, want in (
        ([zero, zero], [0.0, 0]),
        ([zero, one], [0.0, 2]),  # the mean norm, in the only direction there is
        ([one, -one], [0.0, 4]),  # opposite: the first one's
    ):
        other = with_models(world, {"w": one}, *[{"w": model} for model in models])
        assert_same(merged(other, "karcher"), {"w": torch.tensor(want)}, atol=1e-6)


@pytest.mark.parametrize("tasks", [2, 3, 9])
def test_karcher_of_directions_that_cancel_has_the_mean_norm(world: World, tasks: int) -> None:
    """Where rounding decides whether the mean direction is 0, and where each is a combination of the others."""
    models: list[Weights] = [{} for _ in range(tasks)]
    for seed, size in itertools.product(range(20), (1, 2, 50)):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(tasks, size, generator=generator)
        turns = torch.arange(tasks) * (2 * torch.pi / tasks)
        circle = turns.cos().outer(rows[0]) + turns.sin().outer(rows[1])
        rows[-1] = -rows[:-1].sum(0)
        for kind, points in (("cancel", rows), ("circle", circle)):
            for model, row in zip(models, points, strict=True):
                model[f"{kind} {size} {seed}"] = row.clone()
    for name, value in merged(with_models(world, models[0], *models), "karcher").items():
        norm = sum(float(model[name].norm()) for model in models) / tasks
        assert abs(float(value.norm()) / norm - 1) < 1e-6, name
