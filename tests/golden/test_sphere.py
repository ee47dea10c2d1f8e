"""Methods of angles between whole tensors: spherical interpolation, the Karcher mean, Model Stock."""

from __future__ import annotations

import itertools

import pytest
import torch

from mergecli.errors import UsageError
from tests.conftest import Weights, World, assert_same, random_weights
from tests.golden import naive_more
from tests.support.merging import merged, with_models


def near_and_far(world: World, count: int) -> list[list[Weights]]:
    """Models around one base, and models that have little to do with each other."""
    return [list(world.tuned.values())[:count], [random_weights(seed) for seed in range(11, 11 + count)]]


def with_steps(weights: Weights, world: World) -> Weights:
    return {**weights, "steps": world.base["steps"]}


@pytest.mark.parametrize("t", [0, 0.3, 0.5, 1])
def test_slerp_equals_the_naive_one_on_far_and_near_models(world: World, t: float) -> None:
    for models in near_and_far(world, 2):
        got = merged(with_models(world, world.base, *models), "slerp", t=t)
        assert_same(got, with_steps(naive_more.slerp(models, t), world), atol=2e-6)
        if t in (0, 1):
            assert_same(got, models[int(t)], atol=1e-6)


def test_slerp_keeps_the_norm_of_models_of_one_norm(world: World) -> None:
    one, other = (random_weights(seed)["zz.long"] for seed in (11, 12))
    two = with_models(world, {"w": one}, {"w": one / one.norm()}, {"w": other / other.norm()})
    assert abs(float(merged(two, "slerp", t=0.3)["w"].norm()) - 1) < 1e-6


def test_slerp_to_a_tensor_without_direction_and_between_opposite_ones_is_the_line(world: World) -> None:
    vector = torch.tensor([3.0, 4])
    for second in (torch.zeros(2), -vector):
        two = with_models(world, {"w": vector}, {"w": vector}, {"w": second})
        want = 0.75 * vector + 0.25 * second
        assert_same(merged(two, "slerp", t=0.25), {"w": want}, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 3, 30])
def test_karcher_equals_the_naive_mean(world: World, steps: int) -> None:
    for models in near_and_far(world, 3):
        got = merged(with_models(world, world.base, *models), "karcher", steps=steps)
        assert_same(got, with_steps(naive_more.karcher(models, steps), world), atol=2e-6)


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


@pytest.mark.parametrize("tasks", [["t1", "t2"], ["t1", "t2", "t3"]])
def test_model_stock_equals_the_naive_one(world: World, tasks: list[str]) -> None:
    shared = random_weights(20)
    tuned = [
        {k: v + 0.1 * shared[k] if v.is_floating_point() else v for k, v in world.tuned[task].items()}
        for task in tasks
    ]
    other = with_models(world, world.base, *tuned)
    assert_same(
        merged(other, "model_stock"), with_steps(naive_more.model_stock(world.base, tuned), world), atol=2e-6
    )


def test_model_stock_of_equal_models_is_that_model_and_at_right_angles_the_base(world: World) -> None:
    same = with_models(world, world.base, *[world.tuned["t1"]] * 3)
    assert_same(merged(same, "model_stock"), world.tuned["t1"], atol=1e-6)
    for second in ([0.0, 1], [-1.0, 0], [-3.0, 1], [0.0, 0]):
        other = with_models(
            world, {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 0])}, {"w": torch.tensor(second)}
        )
        assert_same(merged(other, "model_stock"), {"w": torch.zeros(2)}, atol=1e-7)
    with pytest.raises(UsageError, match="`model_stock` merges at least 2 models, got 1"):
        merged(world, "model_stock", ["t1"])
