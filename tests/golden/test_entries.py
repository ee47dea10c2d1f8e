"""Methods that work entry by entry, or by the rank of entries in a tensor."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mergecli.errors import UsageError
from tests.conftest import World, assert_same, random_weights
from tests.golden import naive, naive_more
from tests.support.merging import merged, with_models


def with_steps(weights: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    return {**weights, "steps": world.base["steps"]}


@pytest.mark.parametrize(("drop_rate", "rescale"), [(0.5, True), (0.9, True), (0.3, False)])
def test_dare_equals_the_naive_one_under_several_methods(
    world: World, drop_rate: float, rescale: bool
) -> None:
    thin = naive_more.dare(world.base, list(world.tuned.values()), drop_rate, rescale)
    wanted = {
        "task_arithmetic": naive.task_arithmetic(world.base, thin, 0.3),
        "average": naive.average(thin),
        "ties": naive.ties(world.base, thin, 0.3, 0.2, "sum"),
    }
    for of, want in wanted.items():
        got = merged(world, "dare", of={"name": of}, drop_rate=drop_rate, rescale=rescale)
        assert_same(got, with_steps(want, world), atol=2e-6)


def test_dare_that_drops_nothing_is_the_other_method_and_one_that_drops_all_is_refused(world: World) -> None:
    for of in ("task_arithmetic", "average", "ties", "tsv_m"):
        got = merged(world, "dare", of={"name": of}, drop_rate=0)
        assert_same(got, merged(world, of), atol=1e-6)
    with pytest.raises(UsageError, match=r"`method.drop_rate`: expected a number in \[0, 1\), got 1"):
        merged(world, "dare", drop_rate=1)


@pytest.mark.parametrize(
    "of", [{"name": "dare"}, {"name": "della"}, {"name": "lines", "of": {"name": "della"}}]
)
def test_entries_are_not_dropped_twice_by_the_same_numbers(world: World, of: dict[str, object]) -> None:
    with pytest.raises(
        UsageError, match=r"`method\.of`: `(dare|della)` drops entries by the same random numbers"
    ):
        merged(world, "dare", of=of)


def test_dare_drops_the_stated_share_and_keeps_the_mean(world: World) -> None:
    base = {"w": torch.zeros(200_000)}
    other = with_models(world, base, {"w": torch.ones(200_000)})
    got = merged(other, "dare", drop_rate=0.8, of={"name": "task_arithmetic", "scaling_factor": 1})["w"]
    assert set(got.unique().tolist()) == {0.0, 5.0}
    assert abs(float((got == 0).float().mean()) - 0.8) < 0.005  # five standard deviations


@pytest.mark.parametrize(("aggregate", "elect"), list(itertools.product(("mean", "sum"), (True, False))))
def test_della_equals_the_naive_one(world: World, aggregate: str, elect: bool) -> None:
    want = naive_more.della(world.base, list(world.tuned.values()), 0.8, 0.4, 0.3, aggregate, elect)
    got = merged(
        world, "della", scaling_factor=0.8, drop_rate=0.4, window=0.3, aggregate=aggregate, elect=elect
    )
    assert_same(got, with_steps(want, world), atol=2e-6)


def test_della_without_drops_is_ties_that_keeps_all_and_without_election_the_average(world: World) -> None:
    got = merged(world, "della", drop_rate=0, window=0)
    assert_same(got, merged(world, "ties", density=1, aggregate="mean", scaling_factor=1), atol=1e-6)
    got = merged(world, "della", drop_rate=0, window=0, elect=False)
    assert_same(got, merged(world, "average"), atol=2e-6)


def test_della_drops_small_entries_more_often(world: World) -> None:
    entries = torch.arange(1.0, 100_001)
    other = with_models(world, {"w": torch.zeros(100_000)}, {"w": entries})
    got = merged(other, "della", drop_rate=0.5, window=0.8)["w"]
    dropped = (got == 0).float()
    assert abs(float(dropped[:1000].mean()) - 0.896) < 0.05
    assert abs(float(dropped[-1000:].mean()) - 0.104) < 0.05
    assert abs(float(dropped.mean()) - 0.5) < 0.01
    assert abs(float(got.mean() / entries.mean()) - 1) < 0.02


def test_a_window_that_leaves_the_probabilities_is_refused(world: World) -> None:
    with pytest.raises(UsageError, match=r"`method.window`: half of it, 0.2, around `drop_rate` 0.1 leaves"):
        merged(world, "della", drop_rate=0.1, window=0.4)


@pytest.mark.parametrize(("small", "large"), [(0.9, 0.01), (0.5, 0.2), (0, 0.3), (0.4, 0), (0.3, 0.7)])
def test_breadcrumbs_equal_the_naive_ones(world: World, small: float, large: float) -> None:
    want = naive_more.breadcrumbs(world.base, list(world.tuned.values()), 0.7, small, large)
    got = merged(world, "breadcrumbs", scaling_factor=0.7, drop_smallest=small, drop_largest=large)
    assert_same(got, with_steps(want, world), atol=1e-6)


def test_breadcrumbs_that_drop_nothing_are_task_arithmetic_and_cannot_drop_more_than_all(
    world: World,
) -> None:
    got = merged(world, "breadcrumbs", drop_smallest=0, drop_largest=0)
    assert_same(got, merged(world, "task_arithmetic"))
    got = merged(world, "breadcrumbs", drop_smallest=1, drop_largest=0)
    assert_same(got, world.base)
    with pytest.raises(UsageError, match="more than everything is dropped"):
        merged(world, "breadcrumbs", drop_smallest=0.9, drop_largest=0.2)


def test_breadcrumbs_that_drop_only_from_below_are_ties_of_one_task_by_tensor(world: World) -> None:
    got = merged(world, "breadcrumbs", ["t1"], drop_smallest=0.8, drop_largest=0, scaling_factor=1)
    ties = merged(world, "ties", ["t1"], density=0.2, trim="tensor", scaling_factor=1)
    assert_same(
        {name: got[name] for name in ("layer.0.weight", "zz.long")},
        {name: ties[name] for name in ("layer.0.weight", "zz.long")}, atol=1e-6,
    )  # fmt: skip


def test_entries_that_tie_with_a_kept_one_are_kept(world: World) -> None:
    tied = torch.tensor([1.0, -1, 1, 2, 2, 2, 3, 3, 9, 9])
    other = with_models(world, {"w": torch.zeros(10)}, {"w": tied})
    got = merged(other, "breadcrumbs", drop_smallest=0.4, drop_largest=0.2, scaling_factor=1)
    assert got["w"].tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 0, 0]


def test_magmax_equals_the_naive_one_and_the_positive_one_of_a_tie_wins(world: World) -> None:
    want = naive_more.magmax(world.base, list(world.tuned.values()), 0.8)
    assert_same(merged(world, "magmax", scaling_factor=0.8), with_steps(want, world), atol=1e-6)
    other = with_models(
        world, {"w": torch.zeros(2)}, {"w": torch.tensor([2.0, 1])}, {"w": torch.tensor([-2.0, 3])}
    )
    assert merged(other, "magmax", scaling_factor=1)["w"].tolist() == [2, 3]


def test_magmax_of_one_task_is_that_task_and_ties_with_max_where_the_signs_agree(world: World) -> None:
    assert_same(merged(world, "magmax", ["t2"], scaling_factor=1), world.tuned["t2"], atol=1e-6)
    tuned = [
        {k: v + i * random_weights(9)[k].abs() if v.is_floating_point() else v for k, v in world.base.items()}
        for i in (1, 2, 3)
    ]
    other = with_models(world, world.base, *tuned)
    got = merged(other, "magmax", scaling_factor=0.6)
    assert_same(got, merged(other, "ties", density=1, aggregate="max", scaling_factor=0.6), atol=2e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
def test_tall_masks_and_consensus_equal_the_naive_ones(world: World, threshold: float) -> None:
    tuned = list(world.tuned.values())
    for number, task in enumerate(world.tuned):
        want = naive_more.tall_mask(world.base, tuned, number, threshold)
        got = merged(world, "tall_mask", task=task, mask_threshold=threshold)
        assert_same(got, with_steps(want, world), atol=1e-6)
    for agreeing in (0, 1, 2, 3):
        want = naive_more.consensus(world.base, tuned, 0.7, agreeing, threshold)
        got = merged(
            world, "consensus", scaling_factor=0.7, agreeing_tasks=agreeing, mask_threshold=threshold
        )
        assert_same(got, with_steps(want, world), atol=1e-6)


def test_an_entry_as_large_as_the_others_together_is_not_larger(world: World) -> None:
    other = with_models(
        world, {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 2])}, {"w": torch.tensor([1.0, 1])}
    )
    assert merged(other, "tall_mask", task="t1", mask_threshold=1)["w"].tolist() == [0, 3]
    assert merged(other, "consensus", mask_threshold=1, agreeing_tasks=1, scaling_factor=1)["w"].tolist() == [
        0,
        3,
    ]


def test_consensus_of_no_task_is_task_arithmetic_and_a_tall_mask_of_one_task_is_that_task(
    world: World,
) -> None:
    assert_same(merged(world, "consensus", agreeing_tasks=0), merged(world, "task_arithmetic"))
    assert_same(merged(world, "tall_mask", ["t1"], task="t1"), world.tuned["t1"], atol=1e-6)
    with pytest.raises(
        UsageError, match=r"`method.agreeing_tasks`: expected at most the number of tasks, 1, got 2"
    ):
        merged(world, "consensus", ["t1"])
    with pytest.raises(
        UsageError,
        match=r"`method.task`: there is no model `t11` \(did you mean `t1`\?\); there are t1, t2, t3",
    ):
        merged(world, "tall_mask", task="t11")


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_pcb_equals_the_naive_one(world: World, density: float) -> None:
    want = naive_more.pcb(world.base, list(world.tuned.values()), 1.2, density)
    got = merged(world, "pcb", density=density)
    assert_same(got, with_steps(want, world), atol=5e-6)


def test_pcb_of_one_task_keeps_its_largest_entries_clipped_and_drops_the_others(world: World) -> None:
    delta = torch.linspace(-1, 1, 101).roll(50)
    other = with_models(world, {"w": torch.zeros(101)}, {"w": delta})
    got = merged(other, "pcb", density=0.2, scaling_factor=1)["w"]
    kept = got != 0
    assert 19 <= int(kept.sum()) <= 21
    assert float(delta[kept].abs().min()) >= float(delta[~kept].abs().max()) - 0.021
    assert_same({"w": got[kept]}, {"w": delta[kept].clamp(-0.99, 0.99)}, atol=0.011)


@pytest.mark.parametrize("t", [-0.5, 0, 0.3, 1, 2])
def test_linear_equals_the_naive_line(world: World, t: float) -> None:
    tuned = [world.tuned["t1"], world.tuned["t3"]]
    got = merged(world, "linear", ["t1", "t3"], t=t)
    assert_same(got, with_steps(naive_more.linear(tuned, t), world), atol=1e-6)
    if t in (0, 1):
        assert_same(got, tuned[int(t)])


def test_linear_at_the_middle_is_the_average_and_takes_two_models(world: World) -> None:
    assert_same(merged(world, "linear", ["t1", "t2"]), merged(world, "average", ["t1", "t2"]), atol=1e-6)
    for method in ("linear", "slerp"):
        with pytest.raises(UsageError, match=f"`{method}` merges exactly 2 models, got 3"):
            merged(world, method)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("weighted_average", {"weights": [0.1, 0.2, -0.3]}, "add up to 0"),
        ("weighted_average", {"weights": [1, 2]}, "expected one number for each of 3 models, got 2"),
        ("linear", {"t": 4e38}, "expected a number"),
        ("wudi", {"learning_rate": 1e299}, "expected a number at least 0, got 1e\\+299"),
    ],
)
def test_settings_that_would_leave_float32_are_refused(
    world: World, method: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        merged(world, method, **settings)


def test_a_matrix_that_cannot_be_inverted_gives_ace_merging_a_pseudo_inverse(world: World) -> None:
    base, one = torch.zeros(4, 3), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    one[:, 1] = one[:, 0]
    other = with_models(world, {"w.weight": base}, {"w.weight": one}, {"w.weight": one * 2})
    assert bool(merged(other, "ace_merging", ridge=1e-300)["w.weight"].isfinite().all())
