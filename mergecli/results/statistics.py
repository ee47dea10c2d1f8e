"""Statistics of accuracies: intervals, and tests of differences."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist
from typing import NamedTuple


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Count(NamedTuple):
    """Correct predictions of one model."""

    correct: int
    images: int


class Pair(NamedTuple):
    """Disagreements of two models on the same images."""

    first_only: int
    """Images that only the first model classified correctly."""
    second_only: int
    images: int


def wilson(correct: int, images: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of `correct / images` (1927); inside [0, 1], and good for few images too.

    Raises:
        ValueError: there are no images, or more correct predictions than images.
    """
    if not 0 <= correct <= images or images < 1:
        raise ValueError(f"{correct} correct of {images} images")
    z = NormalDist().inv_cdf((1 + level) / 2)
    center = (correct + z * z / 2) / (images + z * z)
    half = z / (images + z * z) * sqrt(correct * (images - correct) / images + z * z / 4)
    return Interval(
        0.0 if correct == 0 else max(0.0, center - half),
        1.0 if correct == images else min(1.0, center + half),
    )


def mean_interval(tasks: Sequence[Count], level: float = 0.95) -> Interval:
    """Interval of the mean of T accuracies p_t, with independent images and the tasks themselves taken as given:
    mean -+ sqrt(sum_t (p_t - w_t)^2) / T, where w_t is that end of the Wilson interval of task t.

    The variance of the mean of independent binomials, recovered from the Wilson intervals (Zou and Donner, 2008),
    so that it is Wilson's own for one task and does not vanish if every prediction is correct.
    """
    mean, below, above = _mean(tasks, level)
    return Interval(mean - below, mean + above)


def difference_interval(first: Sequence[Count], second: Sequence[Count], level: float = 0.95) -> Interval:
    """Interval of mean accuracy of `first` minus that of `second`, for different images.

    For one task this is Newcombe's hybrid score interval (1998, method 10). On the same images it is too wide: use
    `paired_bootstrap`, which needs the predictions.
    """
    mean, below, above = _mean(first, level)
    other, other_below, other_above = _mean(second, level)
    difference = mean - other
    return Interval(
        difference - sqrt(below**2 + other_above**2),
        difference + sqrt(above**2 + other_below**2),
    )


def _mean(tasks: Sequence[Count], level: float) -> tuple[float, float, float]:
    """The mean accuracy, and how far its interval reaches below and above it."""
    accuracies = [each.correct / each.images for each in tasks]
    ends = [wilson(*each, level) for each in tasks]
    below = sqrt(sum((p - end.low) ** 2 for p, end in zip(accuracies, ends, strict=True)))
    above = sqrt(sum((end.high - p) ** 2 for p, end in zip(accuracies, ends, strict=True)))
    return sum(accuracies) / len(tasks), below / len(tasks), above / len(tasks)


def mcnemar(first_only: int, second_only: int) -> float:
    """p-value of McNemar's exact test (1947), two-sided: would a fair coin split the images on which exactly one of two
    models was right as unevenly as this? 1 where there are no such images."""
    total, fewer = first_only + second_only, min(first_only, second_only)
    if 2 * fewer == total:
        return 1.0
    term = tail = 1
    for drawn in range(fewer):
        term = term * (total - drawn) // (drawn + 1)  # comb(total, drawn + 1)
        tail += term
    return 2 * tail / 2**total


def permutation(tasks: Sequence[Pair], *, draws: int = 100_000, seed: int = 0) -> float:
    """p-value of the mean over tasks of accuracy of the first minus that of the second, two-sided: McNemar's test for
    several tasks at once.

    If the models were equally good, a fair coin would decide which of them is right on each image on which exactly one is.
    For one task that is McNemar's exact test. For several the coins are thrown `draws` times, so that no p-value
    is below 1 / (draws + 1).
    """
    if len(tasks) == 1:
        return mcnemar(tasks[0].first_only, tasks[0].second_only)
    import numpy as np

    random = np.random.default_rng(seed)
    seen, drawn = 0.0, np.zeros(draws)
    for won, lost, images in tasks:
        seen += (won - lost) / images
        drawn += (2 * random.binomial(won + lost, 0.5, draws) - (won + lost)) / images
    as_far = int((np.abs(drawn) >= abs(seen) - 1e-12).sum())  # equal sums may differ by their rounding
    return (1 + as_far) / (1 + draws)


def holm(values: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected so that all of them together err as seldom as one would (Holm, 1979)."""
    corrected = [1.0] * len(values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected


def paired_bootstrap(
    tasks: Sequence[Pair], level: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile interval of the mean over tasks of accuracy of the first minus that of the second.

    Images are drawn with replacement within each task, the same for both models. Only how many of them each model
    alone had right matters, so that a resample is one multinomial draw a task.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for won, lost, images in tasks:
        drawn = random.multinomial(
            images, [won / images, lost / images, 1 - (won + lost) / images], resamples
        )
        means += (drawn[:, 0] - drawn[:, 1]) / images / len(tasks)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
