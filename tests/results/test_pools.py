"""Two pools under one heading."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mergecli.results.report import report
from mergecli.results.result import Evaluation, read_result
from mergecli.runtime.errors import UsageError
from tests.results.test_report import result

FUSION_BENCH = (
    "`fusion_bench` (FusionBench's, for transformers: 20 tasks, and only the vision tower was trained)"
)


def of(name: str, pool: str | None = None, **models: str) -> Evaluation:
    return replace(result(name, "ties", mnist=0.5, dtd=0.5), recipe_pool=pool, models=models)


def test_results_of_two_pools_are_refused_however_their_pools_are_known(tmp_path: Path) -> None:
    theirs = of(
        "a",
        sun397="hf:tanganke/clip-vit-base-patch32_sun397",
        mnist="hf:tanganke/clip-vit-base-patch32_mnist",
    )
    ours = of("b", "mine", mnist="m.safetensors")
    for each in ([ours, theirs], [ours, theirs, of("c")]):
        with pytest.raises(UsageError) as caught:
            report(each)
        assert caught.value.message == (
            f"averages of models of different pools do not compare: `mine`: `b`; {FUSION_BENCH}: `a`"
        )
        assert caught.value.hint == "make a table for each pool; a recipe says its own with `pool`"
    assert len(report([ours, of("c"), of("d", "mine")]).rows) == 3
    with pytest.raises(UsageError, match="different pools"):
        report([ours], against=write(theirs, tmp_path / "a.json"))
    with pytest.raises(UsageError, match="different pools"):
        report([ours], normalized=True, fine_tuned=theirs)


def test_a_published_table_of_another_pool_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        report([of("a", "tall")], reference="clip-vit-base-patch32-tsv-pool")
    assert caught.value.message.startswith(
        "averages of models of different pools do not compare: `tall` (TALL masks'"
    )
    assert caught.value.message.endswith(": `clip-vit-base-patch32-tsv-pool`")
    with pytest.raises(UsageError, match="different pools"):
        report([of("a", "tall")], reference="clip-vit-base-patch32-ta8")
    report([of("a", "fusion_bench")], reference="clip-vit-base-patch32-ta8")
    report([of("a")], reference="clip-vit-base-patch32-ta8")


def write(each: Evaluation, file: Path) -> Path:
    file.write_text(each.to_json())
    return file


def test_a_result_keeps_what_its_recipe_says_and_nothing_that_can_be_seen(tmp_path: Path) -> None:
    said, seen = of("a", "mine"), of("b", mnist="ms:tanganke/clip-vit-large-patch14_mnist")
    assert read_result(write(said, tmp_path / "a.json")) == said
    assert (said.pool, seen.pool, of("c").pool) == ("mine", "fusion_bench", None)
    assert "pool" not in json.loads(seen.to_json())
