"""DOGE on AdaMerging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergecli.methods._doge import corrections, is_layer_weight, scales
from tests.conftest import assert_same
from tests.methods.reference.doge_ada_merging import doge_ada_merging
from tests.methods.reference.task_arithmetic import task_arithmetic
from tests.support.adapted_world import AdaptedWorld
from tests.support.exact_clip import ExactClip
from tests.support.learned_merge import agrees, learned

pytestmark = pytest.mark.usefixtures("own_store")


def test_it_is_adam_on_coefficients_of_what_autograd_corrects(clip: ExactClip, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "steps": 4, "learning_rate": 1e-2, "density": 0.4, "correction_steps": 20, "correction_rate": 1e-3,
    }  # fmt: skip
    got = learned(clip.world, tmp_path, "doge_ada_merging", **settings)
    want = doge_ada_merging(clip.sight(), clip.world.base, clip.world.tuned, **settings)
    moves = torch.tensor([is_layer_weight(name) for name in want.merged])
    assert (got[1]["coefficients"][:, ~moves] == torch.tensor(0.3)).all()
    agrees(got, want, 1e-2, 1e-4)


def test_without_steps_and_cuts_it_is_task_arithmetic_on_the_layers_matrices(
    adapted_world: AdaptedWorld, tmp_path: Path
) -> None:
    settings = {"steps": 0, "correction_steps": 0, "density": 1.0}
    tower, _ = learned(adapted_world, tmp_path, "doge_ada_merging", **settings)
    plain = task_arithmetic(adapted_world.base, adapted_world.tuned, 0.3)
    want = {name: plain[name] if is_layer_weight(name) else own for name, own in adapted_world.base.items()}
    assert_same(tower, want, 1e-6)


def test_corrections_of_the_tasks_are_equal_but_where_gradients_vanish_and_one_for_all_is_nearly_them() -> (
    None
):
    deltas = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(1))
    each = scales(deltas, 0.07)
    apart, one = (
        corrections(deltas, each, directions=1, steps=30, learning_rate=1e-3, shared=shared)
        for shared in (False, True)
    )
    assert apart.shape == (3, 8, 5)
    torch.testing.assert_close(apart, one.expand_as(apart), atol=1e-6, rtol=0)
    none = corrections(
        torch.zeros(3, 8, 5), torch.zeros(3), directions=1, steps=3, learning_rate=1, shared=False
    )
    assert not none.any()
