"""Calibration data: which images of a task, by which split, and what identifies them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mergecli.data.tasks import TaskTable, digest
from mergecli.merging.learning.calibration import CalibrationTask, calibration_task
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.sources import parse_source
from tests.support.image_zoo import CLASSES, TEMPLATES, Zoo, make_zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("calibration"))


def test_train_and_test_are_the_splits_that_the_task_calls_so(zoo: Zoo) -> None:
    table = replace(zoo.recipe.tasks["a"], split="train", train_split="test")
    turned = replace(zoo.recipe, tasks={**zoo.recipe.tasks, "a": table})
    assert calibration_task("a", "train", zoo.recipe).facts(head=False)["split"] == "train"
    assert calibration_task("a", "train", turned).facts(head=False)["split"] == "test"
    with pytest.raises(UsageError, match="has no split `dev`"):
        calibration_task("a", "dev", zoo.recipe)


def test_the_facts_say_which_images_and_only_with_a_head_which_classes_and_prompts(zoo: Zoo) -> None:
    task = calibration_task("b", "train", zoo.recipe)
    assert task.images is not None
    facts = task.facts(head=False)
    assert facts == {"split": "train", "images": 28, "data": task.images.fingerprint}
    assert task.facts(head=False, most=5)["images"] == 5
    assert task.facts(head=False, most=99) == facts
    named = {"classes": digest(CLASSES["b"]), "templates": digest(TEMPLATES)}
    assert task.facts(head=True) == facts | named


def test_a_sample_is_drawn_by_label_and_seed_and_keeps_the_order_of_the_data(zoo: Zoo) -> None:
    task = calibration_task("a", "train", zoo.recipe)

    def rows(*drawn: object) -> list[int]:
        images = task.sampled(lambda count: count // 2, *drawn).images  # pyright: ignore[reportArgumentType]
        assert images is not None
        assert images.rows is not None
        return list(images.rows)

    first = rows("label", 0)
    assert len(first) == 13
    assert first == sorted(first) == rows("label", 0)
    assert first != rows("label", 1)
    assert first != rows("other", 0)
    assert task.sampled(lambda count: count, "label", 0) is task


def test_images_that_are_not_here_are_an_error_unless_they_may_be_missing(zoo: Zoo, tmp_path: Path) -> None:
    nowhere = TaskTable(data=parse_source(str(tmp_path / "gone"), Path()), templates=TEMPLATES)
    gone = replace(zoo.recipe, tasks={"a": nowhere})
    assert calibration_task("a", "train", gone, may_lack_images=True) == CalibrationTask("a")
    assert CalibrationTask("a").facts(head=True) == {}
    with pytest.raises(InputError, match="gone"):
        calibration_task("a", "train", gone)
