"""What methods share that measure each model on images before they merge."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergecli.merging import models
from mergecli.runtime.errors import UsageError
from tests.support.image_zoo import Zoo, measured_merge
from tests.support.merging import same_bytes
from tests.support.statistics_in_memory import LINEAR, Given, combine, some

pytestmark = pytest.mark.usefixtures("own_store")

NAMES = ("fisher", "reg_mean", "reg_mean_plus_plus")


@pytest.mark.parametrize("method", NAMES)
def test_excluded_tensors_are_the_bases(zoo: Zoo, method: str) -> None:
    got = measured_merge(zoo, method, exclude=["vision_model.embeddings", r".*\.0\.mlp\.fc1\.weight"])
    kept = [name for name in got if "embeddings" in name or name == LINEAR]
    assert all(got[name].equal(zoo.base[name]) for name in kept)
    assert len([name for name in got if got[name].equal(zoo.base[name])]) == len(kept) == 4


def test_an_exclusion_that_is_no_pattern_is_refused(zoo: Zoo) -> None:
    with pytest.raises(UsageError, match=r"`method.exclude`|`\(` is not a regular expression"):
        measured_merge(zoo, "fisher", exclude=["("])


@pytest.mark.parametrize("method", NAMES)
def test_blocks_threads_and_a_second_merge_change_no_byte(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    want = measured_merge(zoo, method, tmp_path / "s")
    for block, processors in (
        (61, 1),
        (999, 3),
    ):  # neither is a multiple of what a processor computes at once
        monkeypatch.setattr(models, "BLOCK", block)
        monkeypatch.setattr(os, "cpu_count", lambda count=processors: count)
        same_bytes(measured_merge(zoo, method, tmp_path / "s"), want)
    same_bytes(measured_merge(zoo, method), want)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3, 2, 2), (6, 4)])
@pytest.mark.parametrize("method", NAMES[1:])
def test_what_is_no_weight_of_a_linear_layer_is_the_mean(method: str, shape: tuple[int, ...]) -> None:
    rows = some(3, *shape)
    name = "vision_model.embeddings.position_embedding.weight"
    assert combine(method, Given({}), rows, name).equal((rows[0] + rows[1] + rows[2]) / 3)
