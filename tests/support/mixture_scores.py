"""Mixtures in tests: what there is of them, and what they score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mergecli

TASKS = ("one", "two", "three")
TOLD = ("emr", "tall_mask", "tsv_c")
"""Mixtures that must be told the task."""
LEARNED = ("weight_ensembling_moe", "efficient_weight_ensembling_moe")
"""Mixtures with routers."""
ROUTED = ("smile", *LEARNED)
WEIGHT = "vision_model.encoder.layers.0.mlp.fc1.weight"


def counts(place: Path, checkpoint: object, **more: Any) -> dict[str, int]:
    return {task: correct for task, (correct, _) in scores(place, checkpoint, **more).items()}


def scores(place: Path, checkpoint: object, **more: Any) -> dict[str, tuple[int, float]]:
    """Task -> right answers and loss, which tells towers apart that guess alike."""
    (result,) = mergecli.evaluate({"m": str(checkpoint)}, recipe=place / "r.toml", **more)
    return {task: (score.correct, score.loss) for task, score in result.tasks.items()}


def refuse(*_: object) -> None:
    pytest.fail("an image was looked at")
