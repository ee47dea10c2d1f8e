"""What methods share that learn on images before they merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergecli.merging import models
from mergecli.merging.merge import merge
from tests.support.adapted_world import AdaptedWorld
from tests.support.exact_clip import BATCH
from tests.support.learned_merge import learned

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ada_merging", {"steps": 1, "preprocess": "ties"}),
        ("concrete_task_arithmetic", {"steps": 1}),
        ("concrete_ada_merging", {"steps": 1, "mask_steps": 1}),
        ("pwe_moe", {"steps": 1}),
        ("rank_one_moe", {"steps": 0, "rank": 2}),
        ("doge_ada_merging", {"steps": 0, "correction_steps": 2}),
    ],
)
def test_blocks_change_no_byte_of_the_merge(
    adapted_world: AdaptedWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    settings: dict[str, Any],
) -> None:
    learned(adapted_world, tmp_path, method, **settings)
    output = tmp_path / "m.safetensors"
    want = output.read_bytes()
    for block in (61, 999):  # neither is a multiple of what a processor computes at once
        monkeypatch.setattr(models, "BLOCK", block)
        merge(
            adapted_world.recipe, method=method, settings={"batch_size": BATCH, **settings}, output=output,
            coefficients=tmp_path / "learned.safetensors",
        )  # fmt: skip
        assert output.read_bytes() == want
