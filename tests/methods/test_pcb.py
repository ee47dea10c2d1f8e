"""PCB-Merging."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import World, assert_same
from tests.methods.reference.pcb import pcb
from tests.support.merging import merged, with_integers, with_models


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_pcb_equals_the_authors_program_on_whole_task_vectors(world: World, density: float) -> None:
    want = pcb(world.base, list(world.tuned.values()), 1.2, density)
    got = merged(world, "pcb", density=density)
    assert_same(got, with_integers(want, world), atol=5e-6)


def test_pcb_of_one_task_keeps_its_largest_entries_clipped_and_drops_the_others(world: World) -> None:
    delta = torch.linspace(-1, 1, 101).roll(50)
    other = with_models(world, {"w": torch.zeros(101)}, {"w": delta})
    got = merged(other, "pcb", density=0.2, scaling_factor=1)["w"]
    kept = got != 0
    assert 19 <= int(kept.sum()) <= 21
    assert float(delta[kept].abs().min()) >= float(delta[~kept].abs().max()) - 0.021
    assert_same({"w": got[kept]}, {"w": delta[kept].clamp(-0.99, 0.99)}, atol=0.011)
