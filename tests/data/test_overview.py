"""What `mergecli tasks NAME --recipe RECIPE` shows of a task's data."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mergecli.data.overview import ClassFound, contact_sheet, found_for
from mergecli.runtime.errors import InputError, UsageError
from tests.data.test_images import parquet, task
from tests.data.test_inventory import put


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path_factory.mktemp("home")))


def test_each_split_has_its_classes_by_both_names_and_what_was_left_out(tmp_path: Path) -> None:
    put(
        tmp_path,
        "test/n01/0.png",
        "test/n02/0.png",
        "test/n02/1.png",
        "train/n01/0.png",
        "val/n01/0.png",
        "test/a.svg",
    )
    mapping = (("n02", "wren"), ("n01", "robin"), ("n07", "crow"))
    test, train, other = found_for(task(tmp_path, classes=("wren", "robin", "crow"), mapping=mapping))
    assert test.classes == (
        ClassFound(0, ("n02",), "wren", 2),
        ClassFound(1, ("n01",), "robin", 1),
        ClassFound(2, (), "crow", 0),
    )
    assert (test.split, test.images, test.matched) == ("test", 3, "as the recipe maps them")
    assert (train.split, train.images, other.split) == ("train", 1, "val")
    assert test.left_out == "1 file: 1 image"


def test_a_split_that_cannot_be_used_says_why_and_the_evaluated_one_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, "test/robin/0.png", "test/wren/0.png")
    found = found_for(task(tmp_path, classes=("wren", "robin")))
    assert [each.split for each in found] == ["test"]
    with pytest.raises(InputError, match="in the data"):
        found_for(task(tmp_path, classes=("wren", "crow")))
    image = (tmp_path / "test/robin/0.png").read_bytes()
    folder = parquet(tmp_path / "d", "test.parquet", image=[image], label=[0])
    parquet(folder, "train-00000-of-00002.parquet", image=[image], label=[0])
    _, train = found_for(task(folder, classes=("robin",)))
    assert train.problem.endswith("has 1 of 2 shards; `-00001-of-00002` is missing")


def test_a_contact_sheet_has_the_images_of_each_class_and_stays_out_of_the_data(tmp_path: Path) -> None:
    put(tmp_path / "d", "test/robin/0.png", "test/wren/0.png", "test/wren/1.png")
    (tmp_path / "d/test/wren/2.png").write_bytes(b"damaged")
    contact_sheet(task(tmp_path / "d"), tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    colors = {color for _, color in sheet.getcolors(1 << 20) or []}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= colors
    with pytest.raises(UsageError, match=r"sheet.svg: expected a .png or .pdf file"):
        contact_sheet(task(tmp_path / "d"), tmp_path / "sheet.svg")
    with pytest.raises(UsageError, match="lies in the data of `tints`, which is never written to"):
        contact_sheet(task(tmp_path / "d"), tmp_path / "d/sheet.png")
