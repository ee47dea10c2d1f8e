"""Settings of engines, and parts of the units."""

from __future__ import annotations

import random
from itertools import chain

import pytest

from mergecli.runtime.engines.contract import Engine, Unit, part_of
from mergecli.runtime.errors import UsageError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dask"}, "--engine: expected one of local, ray, got `dask`"),
        ({"name": "Ray"}, "--engine: expected one of local, ray, got `Ray` (did you mean `ray`?)"),
        ({"jobs": 0}, "--jobs: expected a whole number, at least 1, got 0"),
        ({"jobs": "2"}, "--jobs: expected a whole number, at least 1, got '2'"),
        ({"retries": -1}, "--retries: expected a whole number, at least 0, got -1"),
        ({"name": "ray", "gpus_per_unit": 1.5}, "--gpus-per-unit: expected a fraction such as 0.5, or a whole number, got 1.5"),
        ({"gpus": "both"}, "--gpus: expected `all`, or numbers such as `0,1`, got `both`"),
        ({"address": "auto"}, "--address: belongs to `--engine ray`, the engine is local"),
        ({"gpus_per_unit": 1}, "--gpus-per-unit: belongs to `--engine ray`, the engine is local"),
        ({"name": "ray", "jobs": 2}, "--jobs: belongs to `--engine local`, the engine is ray"),
        ({"name": "ray", "gpus": "all"}, "--gpus: belongs to `--engine local`, the engine is ray"),
        ({"part": "3"}, "--part: expected I/N with I from 1 to N, such as 1/4, got `3`"),
        ({"part": "5/4"}, "--part: expected I/N with I from 1 to N, such as 1/4, got `5/4`"),
        ({"part": "0/4"}, "--part: expected I/N with I from 1 to N, such as 1/4, got `0/4`"),
        ({"part": "1/4", "collect": True}, "--collect: puts together what all parts have done, and does not go with --part"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong_or_do_not_go_together_are_refused(settings, message):
    with pytest.raises(UsageError) as caught:
        Engine(**settings)
    assert caught.value.message == message


def test_an_array_that_begins_at_zero_is_told_how_to_say_it():
    with pytest.raises(UsageError) as caught:
        Engine(part="0/4")
    assert caught.value.hint.startswith(
        "arrays of Slurm that begin at 0 add one: `--part $((SLURM_ARRAY_TASK_ID + 1))/"
    )


def test_gpus_mean_cuda():
    assert (Engine(gpus="all").device("cpu"), Engine().device("cpu")) == ("cuda", "cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_each_unit_is_in_one_part_and_parts_of_equal_units_differ_by_one_at_most(count):
    units = [Unit((str(number),), str(number)) for number in range(20)]
    parts = [part_of(units, [5] * 20, (number, count)) for number in range(1, count + 1)]
    assert list(chain(*parts)) == units
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_parts_of_unequal_units_weigh_about_the_same():
    rng = random.Random(0)
    weights = [rng.randrange(1, 100) for _ in range(200)]
    units = [Unit((str(number),), "") for number in range(200)]
    weigh = dict(zip(units, weights, strict=True))
    parts = [part_of(units, weights, (number, 8)) for number in range(1, 9)]
    assert sorted(unit.of for part in parts for unit in part) == sorted(unit.of for unit in units)
    assert all(abs(sum(weigh[unit] for unit in part) - sum(weights) / 8) <= 100 for part in parts)
