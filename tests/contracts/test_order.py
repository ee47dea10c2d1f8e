"""Methods differ on the toys by what they are for: a change that loses a method's point fails here."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from pyarrow import parquet

import mergecli
from mergecli.data.toy import TASKS
from mergecli.results.statistics import Pair, holm, permutation

RECIPE = Path(__file__).parents[2] / "recipes" / "toy.toml"

METHODS = (
    "average",
    "task_arithmetic",
    "ties",
    "iso_c",
    "tsv_m",
    "reg_mean",
    "reg_mean_plus_plus",
    "tsv_c",
)
"""At the settings of the published tables."""

BETTER = [
    ("average", "base"),
    ("task_arithmetic", "average"),
    ("ties", "average"),
    ("reg_mean", "ties"),
    ("tsv_m", "iso_c"),
    ("tsv_m", "ties"),
    ("reg_mean_plus_plus", "reg_mean"),
    ("reg_mean_plus_plus", "tsv_m"),
    ("tsv_c", "reg_mean_plus_plus"),
]
"""A merge, and one that it is better than on the eight tasks."""

Right = dict[str, dict[str, list[bool]]]
"""Checkpoint -> task -> whether each image was classified correctly."""


def answers(file: Path) -> Right:
    right: Right = defaultdict(lambda: defaultdict(list))
    for row in parquet.read_table(file).to_pylist():
        right[row["checkpoint"]][row["task"]].append(row["prediction"] == row["label"])
    return right


def paired(first: dict[str, list[bool]], second: dict[str, list[bool]]) -> list[Pair]:
    pairs: list[Pair] = []
    for task in TASKS:
        both = list(zip(first[task], second[task], strict=True))
        won, lost = both.count((True, False)), both.count((False, True))
        pairs.append(Pair(won, lost, len(both)))
    return pairs


def check(right: Right) -> None:
    """That each merge of `BETTER` is better than the other by more than chance, all tests together at 5 %."""
    average = {
        name: sum(sum(each) / len(each) for each in tasks.values()) / len(tasks)
        for name, tasks in right.items()
    }
    shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in average.items())
    for better, worse in BETTER:
        assert average[better] > average[worse], shown
    chances = holm([permutation(paired(right[better], right[worse])) for better, worse in BETTER])
    assert max(chances) < 0.05, (shown, dict(zip(BETTER, chances, strict=True)))


@pytest.mark.slow
def test_methods_keep_their_order_on_the_toys(tmp_path: Path) -> None:
    towers = {"base": "toy:base"}
    for method in METHODS:
        output = tmp_path / f"{method}.safetensors"
        towers[method] = str(mergecli.merge(RECIPE, method=method, output=output).path)
    mergecli.evaluate(towers, recipe=RECIPE, predictions=tmp_path / "each.parquet")
    check(answers(tmp_path / "each.parquet"))


def test_an_order_that_is_lost_or_chance_is_seen() -> None:
    def of(more: int) -> dict[str, list[bool]]:
        return {task: [number < 50 + more * (task == "digits") for number in range(100)] for task in TASKS}

    with pytest.raises(AssertionError, match=r"base 50\.0, average 50\.0, task_arithmetic 50\.0"):
        check({name: of(0) for name in ("base", *METHODS)})
    by_a_hair = {name: place for place, name in enumerate(("base", *METHODS))}
    with pytest.raises(AssertionError, match=r"assert 1\.0 < 0\.05"):
        check({name: of(more) for name, more in by_a_hair.items()})
