"""Models that may have been trained on the test images, in a report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mergecli.data.tasks import digest, find
from mergecli.results.cells import Estimate
from mergecli.results.report import report
from mergecli.results.result import Evaluation
from mergecli.results.statistics import Count, mean_interval
from tests.results.test_report import column, names, result

OLD = "hf:nik-dim/tall_masks#single_task/ViT-B-32/DTDVal/nonlinear_finetuned.pt"
WHY = "the versions of the TALL pool before 13 December 2024 were (nik-dim/tall_masks, issue 1)"


def test_models_that_may_have_been_trained_on_test_images_are_named_once() -> None:
    expert = result("expert", dtd=0.5)
    expert = replace(expert, checkpoint={**expert.checkpoint, "path": OLD})
    merges = [replace(result(each, "ties", dtd=0.4, svhn=0.4), models={"dtd": OLD}) for each in "ab"]
    elsewhere = replace(result("c", "ties", dtd=0.4), models={"dtd": "hf:org/clip-vit-base-patch32_dtd"})
    text = f"`expert`, `a`, `b`: may have been trained on test images of `dtd`: {WHY}"
    assert [each for each in report([expert, *merges, elsewhere]).warnings if "trained" in each] == [text]
    other = replace(result("d", "ties", svhn=0.4), models={"dtd": OLD})
    train = replace(expert, tasks={"dtd": replace(expert.tasks["dtd"], split="train")})
    assert not [each for each in report([other, train]).warnings if "trained on" in each]


def test_an_accuracy_that_no_clean_model_reaches_is_named() -> None:
    def of(name: str, accuracy: float, images: int = 1880, split: str = "test") -> Evaluation:
        each = result(name, None, images, dtd=accuracy)
        score = replace(each.tasks["dtd"], classes=digest(find("dtd").classes or ()), split=split)
        return replace(each, tasks={"dtd": score})

    clean = [of("clean", 0.86), of("few", 1.0, 10), of("train", 0.99, split="train"), result("toy", dtd=0.99)]
    warnings = [each for each in report([*clean, of("old", 0.9798)]).warnings if "suggests" in each]
    assert warnings == [
        "`old`: more than 90 % on `dtd`, which suggests training on its test images: models trained on its test images reach "
        "98 %, clean ones of the same pools at most 86 %"
    ]  # fmt: skip


def test_the_average_without_the_task_stands_beside_the_other() -> None:
    merge = replace(
        result("a", "ties", dtd=0.9, svhn=0.4, mnist=0.6), models={"dtd": OLD, "svhn": "a", "mnist": "b"}
    )
    table = report([merge, result("b", "ties", dtd=0.5), result("c", "ties", svhn=0.7)])
    assert names(table)[-1] == "average (without dtd)"
    assert column(table, "average (without dtd)") == [pytest.approx(0.5), None, 0.7]
    (estimate,) = column(report([merge], intervals=True), "average (without dtd)")
    assert estimate == Estimate(0.5, *mean_interval([Count(400, 1000), Count(600, 1000)]))
    assert names(report([replace(merge, tasks={"dtd": merge.tasks["dtd"]})]))[-1] == "average"
