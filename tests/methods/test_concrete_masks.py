"""Masks that are learned, random or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergecli.merging.merge import merge
from tests.conftest import assert_same
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.support.adapted_world import AdaptedWorld
from tests.support.exact_clip import BATCH
from tests.support.learned_merge import learned

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("concrete_task_arithmetic", {"steps": 2, "scaling_factor": 0.4}),
        ("concrete_ada_merging", {"steps": 0, "mask_steps": 1, "start": 0.4}),
    ],
)
def test_a_mask_that_is_one_everywhere_is_task_arithmetic(
    adapted_world: AdaptedWorld, tmp_path: Path, method: str, settings: dict[str, float]
) -> None:
    want = task_arithmetic(adapted_world.base, adapted_world.tuned, 0.4)
    for mask in ("sample", "expected", "discrete"):
        tower, _ = learned(adapted_world, tmp_path, method, initial_logits=60.0, mask=mask, **settings)
        assert_same(tower, want, 1e-6)


def test_random_masks_depend_on_the_seed_and_on_nothing_else(
    adapted_world: AdaptedWorld, tmp_path: Path
) -> None:
    def made(seed: int, name: str) -> bytes:
        output = tmp_path / name / "m.safetensors"
        merge(
            adapted_world.recipe, method="concrete_task_arithmetic", output=output,
            settings={"steps": 1, "batch_size": BATCH}, changes=[f"seed={seed}"],
        )  # fmt: skip
        return output.read_bytes()

    first = made(7, "first")
    assert made(7, "second") == first
    assert made(8, "third") != first
