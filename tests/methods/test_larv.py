"""LARV in front of other methods."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergecli.methods.larv import _richness_and_conflict as facts_of
from mergecli.runtime.errors import UsageError
from tests.conftest import World, assert_same
from tests.methods.reference.larv import conflict, effective_rank, larv, tanh, tiers
from tests.support.layered_world import layered_world
from tests.support.merging import merged, same_bytes, with_integers, with_models


@pytest.mark.parametrize("gate", ["tiers", "tanh"])
@pytest.mark.parametrize("of", ["task_arithmetic", "ties", "iso_c"])
def test_larv_is_the_other_method_on_scaled_task_vectors(tmp_path: Path, gate: str, of: str) -> None:
    world = layered_world(tmp_path, 3, [0.1, 0.2, 0.05])
    got = merged(world, "larv", of={"name": of}, gate=gate)
    scaled = larv(world.base, list(world.tuned.values()), {"tiers": tiers, "tanh": tanh}[gate])
    other = with_models(world, world.base, *[with_integers(each, world) for each in scaled])
    assert_same(got, merged(other, of), atol=3e-6)


def test_scales_of_one_give_the_method_bit_for_bit(layered: World) -> None:
    same_bytes(merged(layered, "larv", tiers=[1.0]), merged(layered, "task_arithmetic"))


def test_a_modifier_in_a_modifier_sees_scaled_task_vectors(layered: World) -> None:
    got = merged(layered, "lines", of={"name": "larv", "tiers": [0.5]}, first_layer=1.0, increase=0.0)
    assert_same(got, merged(layered, "task_arithmetic", scaling_factor=0.15), atol=1e-6)


def test_no_tiers_are_refused(layered: World) -> None:
    with pytest.raises(UsageError, match=r"`method\.tiers`: expected at least one scale"):
        merged(layered, "larv", tiers=[])


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_richness_and_conflict_are_those_of_full_decompositions(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    base, delta = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    rich, clash = facts_of(base, delta)
    assert rich == pytest.approx(effective_rank(base) / effective_rank(delta))
    assert clash == pytest.approx(conflict(base, delta))
    assert facts_of(3 * base, 0.1 * delta) == pytest.approx((rich, clash)), "neither minds scales"
    assert facts_of(base, 2 * base) == pytest.approx((1, 0), abs=1e-7)


def test_the_effective_rank_counts_equal_singular_values() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    one = torch.outer(torch.arange(6).double(), torch.ones(6).double())
    assert facts_of(eye, one)[0] == pytest.approx(6)
