from __future__ import annotations

from itertools import product
from math import comb, sqrt

import numpy as np
import pytest

from mergecli.results.statistics import (
    Count,
    Pair,
    difference_interval,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    permutation,
    wilson,
)


@pytest.mark.parametrize(
    ("correct", "images", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_intervals_that_newcombe_published(
    correct: int, images: int, low: float, high: float
) -> None:
    """Statistics in Medicine 17 (1998), 857-872, table I, method 3."""
    assert wilson(correct, images) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirrored = wilson(images - correct, images)
    assert mirrored == (pytest.approx(1 - high, abs=5e-5), pytest.approx(1 - low, abs=5e-5))


def test_wilson_ends_exactly_at_0_and_1_and_never_leaves_them() -> None:
    assert wilson(0, 7).low == 0
    assert wilson(7, 7).high == 1
    for images in (1, 2, 3, 1000, 10**6):
        low, high = wilson(images // 3, images)
        assert 0 <= low <= images // 3 / images <= high <= 1
    with pytest.raises(ValueError, match="3 correct of 2 images"):
        wilson(3, 2)


def test_a_higher_level_is_a_wider_interval() -> None:
    assert wilson(5, 10, 0.99).low < wilson(5, 10).low < wilson(5, 10, 0.5).low < 0.5


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_a_difference_has_the_interval_that_newcombe_published(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    """Statistics in Medicine 17 (1998), 873-890, table II, method 10."""
    got = difference_interval([Count(*first)], [Count(*second)])
    assert got == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_the_interval_of_a_mean_is_wilsons_for_one_task_and_the_normal_one_for_many_images() -> None:
    assert mean_interval([Count(81, 263)]) == pytest.approx(wilson(81, 263))
    tasks = [Count(600_000, 1_000_000), Count(1_500_000, 2_000_000)]
    spread = sqrt(sum(c / n * (1 - c / n) / n for c, n in tasks)) / 2
    mean = (0.6 + 0.75) / 2
    assert mean_interval(tasks) == pytest.approx(
        (mean - 1.959964 * spread, mean + 1.959964 * spread), abs=1e-6
    )


def test_the_interval_of_a_perfect_mean_does_not_vanish() -> None:
    low, high = mean_interval([Count(10, 10)] * 4)
    assert high == 1
    assert low == pytest.approx(1 - (1 - wilson(10, 10).low) / 2)


def test_mcnemar_is_the_exact_binomial_test_of_the_images_on_which_two_models_differ() -> None:
    assert mcnemar(1, 9) == 2 * (1 + 10) / 1024
    assert mcnemar(15, 5) == mcnemar(5, 15) == pytest.approx(0.04138946533203125, abs=0)
    assert mcnemar(0, 0) == mcnemar(1, 1) == mcnemar(0, 1) == 1
    for first, second in product(range(7), repeat=2):
        total = first + second
        as_uneven = [k for k in range(total + 1) if abs(2 * k - total) >= abs(first - second)]
        assert mcnemar(first, second) == sum(comb(total, k) for k in as_uneven) / 2**total


def test_mcnemar_of_many_images_neither_overflows_nor_loses_digits() -> None:
    assert mcnemar(100, 20_000) == 0
    z = (5100 - 5000 - 1) / sqrt(10_100)  # with continuity correction
    from statistics import NormalDist

    assert mcnemar(5000, 5100) == pytest.approx(2 * NormalDist().cdf(-z), abs=1e-4)


def test_the_bootstrap_is_the_same_every_time_and_another_with_another_seed() -> None:
    tasks = [Pair(30, 10, 1000), Pair(3, 9, 50)]
    assert paired_bootstrap(tasks) == paired_bootstrap(tasks)
    assert paired_bootstrap(tasks) != paired_bootstrap(tasks, seed=1)


def test_the_bootstrap_holds_the_difference_and_shrinks_to_it() -> None:
    low, high = paired_bootstrap([Pair(30, 10, 1000), Pair(3, 9, 50)])
    assert low < (0.02 - 0.12) / 2 < high
    assert paired_bootstrap([Pair(0, 0, 100)]) == (0, 0)
    assert paired_bootstrap([Pair(100, 0, 100)]) == (1, 1)


def test_resampled_counts_are_resampled_images() -> None:
    """A resample of images one by one, for a small task: the same distribution of differences."""
    images = np.array([1] * 6 + [-1] * 3 + [0] * 11)
    random = np.random.default_rng(5)
    means = images[random.integers(0, 20, (40_000, 20))].mean(1)
    got = paired_bootstrap([Pair(6, 3, 20)], resamples=40_000)
    assert got == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.05)  # steps of 1/20


def test_the_bootstrap_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    truth = (0.10 - 0.05 + 0.2 - 0.1) / 2
    held = 0
    for _ in range(300):
        drawn = [random.multinomial(150, [0.10, 0.05, 0.85]), random.multinomial(80, [0.2, 0.1, 0.7])]
        low, high = paired_bootstrap([Pair(int(d[0]), int(d[1]), int(d.sum())) for d in drawn], resamples=500)
        held += low <= truth <= high
    assert 0.90 <= held / 300 <= 0.99  # 95 % +- 4 standard deviations


def every_outcome(tasks: list[Pair]) -> float:
    """The permutation test, by going through every way in which the coins can fall."""
    seen = sum((each.first_only - each.second_only) / each.images for each in tasks)
    coins = [1 / each.images for each in tasks for _ in range(each.first_only + each.second_only)]
    fallen = [abs(sum(side * coin for side, coin in zip(sides, coins, strict=True)))
              for sides in product((1, -1), repeat=len(coins))]  # fmt: skip
    return sum(each >= abs(seen) - 1e-12 for each in fallen) / len(fallen)


def test_the_permutation_test_of_one_task_is_mcnemars() -> None:
    for first, second in product(range(5), repeat=2):
        pair = [Pair(first, second, 20)]
        assert permutation(pair) == mcnemar(first, second) == pytest.approx(every_outcome(pair))


@pytest.mark.parametrize(
    "tasks",
    [
        [Pair(5, 1, 10), Pair(3, 2, 40)],
        [Pair(4, 0, 30), Pair(4, 0, 30), Pair(3, 0, 30)],
        [Pair(1, 6, 7), Pair(4, 2, 50)],
        [Pair(0, 0, 5), Pair(2, 0, 9)],
        [Pair(0, 0, 5), Pair(0, 0, 9)],
    ],
)
def test_the_permutation_test_counts_outcomes_that_are_as_far_from_no_difference(tasks: list[Pair]) -> None:
    expected = every_outcome(tasks)
    spread = sqrt(expected * (1 - expected) / 100_000)
    assert permutation(tasks) == pytest.approx(expected, abs=5 * spread + 1e-5)
    mirrored = [Pair(each.second_only, each.first_only, each.images) for each in tasks]
    assert permutation(mirrored) == pytest.approx(expected, abs=5 * spread + 1e-5)


def test_the_permutation_test_is_never_certain_and_the_same_every_time() -> None:
    tasks = [Pair(500, 0, 1000), Pair(400, 10, 1000)]
    assert permutation(tasks) == permutation(tasks) == 1 / 100_001


def test_models_that_are_equally_good_differ_significantly_as_seldom_as_the_test_says() -> None:
    random = np.random.default_rng(7)
    found = []
    for _ in range(300):
        won, lost = random.binomial(150, 0.1, 2), random.binomial(60, 0.2, 2)
        tasks = [Pair(int(won[0]), int(won[1]), 150), Pair(int(lost[0]), int(lost[1]), 60)]
        found.append(permutation(tasks, draws=1000))
    assert np.mean(np.array(found) < 0.05) <= 0.05 + 3 * sqrt(0.05 * 0.95 / 300)
    assert 0.4 <= np.mean(np.array(found) < 0.5) <= 0.6


def step_down(values: list[float], level: float) -> list[bool]:
    """Which hypotheses Holm's procedure rejects, step by step as it is defined."""
    left, rejected = dict(enumerate(values)), [False] * len(values)
    while left:
        place = min(left, key=left.__getitem__)
        if left[place] > level / len(left):
            break
        rejected[place] = True
        del left[place]
    return rejected


def test_corrected_p_values_reject_what_holms_procedure_rejects() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    random = np.random.default_rng(1)
    for _ in range(50):
        values = [float(each) for each in random.random(6) ** 4]
        for level in (0.01, 0.05, 0.2):
            assert [each <= level for each in holm(values)] == step_down(values, level)
