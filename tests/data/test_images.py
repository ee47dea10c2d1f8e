from __future__ import annotations

import os
import shutil
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mergecli.data import parquet as rows
from mergecli.data.images import balanced, load_images
from mergecli.data.tasks import Task, find
from mergecli.runtime.errors import InputError, UsageError
from mergecli.storage.sources import Source, parse_source
from tests.support.tiny_clip import CLASSES, make_image_folder, make_image_task, tinted

REAL = Path(os.environ.get("MERGECLI_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_task(tmp_path_factory.mktemp("images") / "tints")


def task(folder: Path, **given: object) -> Task:
    values: dict[str, object] = {
        "name": "tints", "description": "", "data": parse_source(str(folder), Path()), "config": None, "split": "test",
        "train_split": "train", "image_column": "image", "label_column": "label", "classes": None,
        "templates": ("a {}",),
    }  # fmt: skip
    return Task(**values | given)  # type: ignore[arg-type]


def parquet(folder: Path, name: str = "test.parquet", **columns: list[object]) -> Path:
    import pyarrow as pa
    from pyarrow import parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return folder


def png(image: Image.Image, path: Path) -> dict[str, object]:
    image.save(path, "PNG")
    return {"bytes": path.read_bytes(), "path": None}


def test_parquet_files_give_their_images_labels_and_class_names(data):
    images = load_images(task(data))
    assert (len(images), images.classes, images.split) == (12, CLASSES, "test")
    picture, label = images[4]
    assert label == 1
    assert picture.mode == "RGB"
    assert picture.tobytes() == tinted(1, (0, 1, 4)).tobytes()
    assert len(load_images(task(data), "train")) == 30


def test_an_index_outside_the_data_ends_a_loop(data):
    assert len(list(load_images(task(data)))) == 12
    with pytest.raises(IndexError):
        load_images(task(data))[-1]


@pytest.mark.parametrize(
    "name", ["test-00000-of-00001.parquet", "data/test.parquet", "test/0000.parquet", "test-0.parquet"]
)
def test_a_split_is_told_by_the_file_s_name_or_its_folder(data, tmp_path, name):
    target = tmp_path / "other" / name
    target.parent.mkdir(parents=True)
    shutil.copy(data / "test-00000-of-00001.parquet", target)
    assert len(load_images(task(tmp_path / "other"))) == 12


def test_shards_are_read_in_the_order_of_their_names(data, tmp_path):
    for number, split in enumerate(("test", "train")):
        shutil.copy(
            data / f"{split}-00000-of-00001.parquet", tmp_path / f"test-0000{number}-of-00002.parquet"
        )
    images = load_images(task(tmp_path))
    assert len(images) == 42
    assert images[12][0].tobytes() == tinted(0, (0, 0, 0)).tobytes()


def test_the_configuration_s_folder_is_chosen_and_two_without_one_are_refused(data, tmp_path):
    for config, split in (("big", "train"), ("small", "test")):
        (tmp_path / config).mkdir()
        shutil.copy(data / f"{split}-00000-of-00001.parquet", tmp_path / config / "test.parquet")
    assert len(load_images(task(tmp_path, config="big"))) == 30
    with pytest.raises(InputError, match="split `test` in several folders: `big`, `small`"):
        load_images(task(tmp_path))


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(data, tmp_path):
    moved = shutil.copytree(data, tmp_path / "moved")
    assert load_images(task(moved)).fingerprint == load_images(task(data)).fingerprint
    assert load_images(task(data), "train").fingerprint != load_images(task(data)).fingerprint


def test_a_changed_file_of_the_same_age_is_not_taken_for_the_old_one(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    test = copy / "test-00000-of-00001.parquet"
    before = test.stat()
    assert len(load_images(task(copy))) == 12
    shutil.copy(copy / "train-00000-of-00001.parquet", test)
    os.utime(test, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(load_images(task(copy))) == 30


def test_the_data_folder_stays_as_it_was_and_nothing_is_printed(data, capfd):
    before = sorted(data.rglob("*"))
    load_images(task(data))[0]
    assert sorted(data.rglob("*")) == before
    assert capfd.readouterr() == ("", "")


def test_without_a_place_for_a_cache_the_data_are_read_all_the_same(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "file"))
    assert len(load_images(task(data))) == 12


def test_reading_opens_no_socket(data, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(load_images(task(data))) == 12


def test_image_folders_give_the_folders_as_classes(tmp_path):
    make_image_folder(tmp_path / "test")
    make_image_folder(tmp_path / "train", images=3)
    images = load_images(task(tmp_path))
    assert (len(images), images.classes) == (6, ("blue", "green", "red"))
    assert images[0][1] == 0
    assert images[0][0].tobytes() == tinted(2, (2, 0)).tobytes()
    assert len(load_images(task(tmp_path), "train")) == 9


def test_a_class_without_images_in_one_split_keeps_its_label(tmp_path):
    make_image_folder(tmp_path / "train")
    make_image_folder(tmp_path / "test")
    shutil.rmtree(tmp_path / "test" / "blue")
    images = load_images(task(tmp_path))
    assert images.classes == ("blue", "green", "red")
    assert [images[index][1] for index in range(len(images))] == [1, 1, 2, 2]


def test_an_image_folder_without_splits_is_the_test_split_and_no_other(tmp_path):
    make_image_folder(tmp_path)
    assert len(load_images(task(tmp_path))) == 6
    with pytest.raises(UsageError, match="has no split `train`"):
        load_images(task(tmp_path), "train")


def test_a_missing_validation_split_is_a_tenth_of_the_training_images(data):
    kept, rest = load_images(task(data), "validation"), load_images(task(data), "train-without-validation")
    first, second = torch.utils.data.random_split(range(30), [27, 3], torch.Generator().manual_seed(0))
    assert list(kept.rows or ()) == list(second.indices)
    assert list(rest.rows or ()) == list(first.indices)
    whole = load_images(task(data), "train")
    assert kept[1][0].tobytes() == whole[second.indices[1]][0].tobytes()


def test_a_validation_split_that_is_there_is_taken(data, tmp_path):
    shutil.copy(data / "test-00000-of-00001.parquet", tmp_path / "valid.parquet")
    shutil.copy(data / "train-00000-of-00001.parquet", tmp_path / "train.parquet")
    assert len(load_images(task(tmp_path), "validation")) == 12
    assert len(load_images(task(tmp_path), "train-without-validation")) == 30


def test_labels_that_are_true_or_false_are_one_and_zero(tmp_path):
    image = png(tinted(0, (1,)), tmp_path / "a.png")
    folder = parquet(tmp_path / "d", image=[image, image], label=[True, False])
    images = load_images(task(folder, classes=("no", "yes")))
    assert [images[0][1], images[1][1]] == [1, 0]
    assert type(images[0][1]) is int


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    image = png(tinted(0, (1,)).convert(mode), tmp_path / "a.png")
    images = load_images(task(parquet(tmp_path / "d", image=[image], label=[0]), classes=("a",)))
    assert images[0][0].mode == "RGB"


def test_pixels_that_are_stored_as_numbers_are_images(tmp_path):
    image = tinted(0, (1,))
    rows = [np.asarray(image).tolist(), np.asarray(tinted(1, (2,))).tolist()]
    images = load_images(task(parquet(tmp_path / "d", image=rows, label=[0, 0]), classes=("a",)))
    assert images[0][0].tobytes() == image.tobytes()


@pytest.mark.parametrize("column", [[1, 2], [0.5, 1.0], [{"width": 3}, {"width": 4}]])
def test_a_column_that_holds_no_images_is_refused(tmp_path, column):
    folder = parquet(tmp_path / "d", image=column, label=[0, 0])
    with pytest.raises(InputError, match="column `image` does not hold images, but"):
        load_images(task(folder, classes=("a",)))


@pytest.mark.parametrize("kind", ["bytes", "path", "binary", "string"])
def test_files_and_their_paths_are_images(tmp_path, kind):
    stored = png(tinted(0, (1,)), tmp_path / "a.png")
    row = {
        "bytes": stored,
        "path": {"bytes": None, "path": str(tmp_path / "a.png")},
        "binary": stored["bytes"],
        "string": str(tmp_path / "a.png"),
    }[kind]
    images = load_images(task(parquet(tmp_path / "d", image=[row], label=[0]), classes=("a",)))
    assert images[0][0].tobytes() == tinted(0, (1,)).tobytes()


def test_row_groups_are_read_one_by_one_in_any_order_and_forgotten(data, tmp_path, monkeypatch):
    from pyarrow import parquet as pq

    table = pq.read_table(data / "train-00000-of-00001.parquet")
    for number, part in enumerate((table.slice(0, 17), table.slice(17))):
        pq.write_table(part, tmp_path / f"train-0000{number}-of-00002.parquet", row_group_size=4)
    whole, parts = load_images(task(data), "train"), load_images(task(tmp_path), "train")
    monkeypatch.setattr(rows, "HELD", 1)
    for number in (29, 0, 16, 17, 3, 29):
        assert parts[number][0].tobytes() == whole[number][0].tobytes()
        assert parts[number][1] == whole[number][1]
    assert len(rows._held.groups) == 1


def test_the_labels_of_all_images_are_known_without_decoding_one(data):
    for images in (
        load_images(task(data)),
        load_images(find("digits")),
        load_images(task(data), "validation"),
    ):
        assert images.labels == [label for _, label in images]


def test_columns_of_other_names_are_found(tmp_path):
    image = png(tinted(0, (1,)), tmp_path / "a.png")
    folder = parquet(tmp_path / "d", jpg=[image], cls=[0])
    assert len(load_images(task(folder, image_column="jpg", label_column="cls", classes=("a",)))) == 1
    with pytest.raises(InputError, match="has no column `image`, `label`") as caught:
        load_images(task(folder, classes=("a",)))
    assert caught.value.hint == "it has `jpg`, `cls`; `image` and `label` under `[tasks.tints]` name others"


def test_toy_images_are_drawn():
    images = load_images(find("digits"))
    assert len(images) == 450
    assert images[3][0].size == (32, 32)
    assert images.fingerprint != load_images(find("digits"), "train").fingerprint
    assert len(load_images(find("digits"), "validation")) == 200
    with pytest.raises(UsageError, match=r"toy:digits .*has no split `spatter`"):
        load_images(find("digits"), "spatter")


def test_data_that_are_not_there_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        load_images(task(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="has not been fetched"):
        load_images(task(tmp_path, data=Source("hf", "org/name", None, None)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds neither Parquet files nor a folder of images"):
        load_images(task(tmp_path / "empty"))


def test_an_unknown_split_is_refused_and_the_others_listed(data):
    with pytest.raises(UsageError, match="has no split `tset`") as caught:
        load_images(task(data), "tset")
    assert "`test`" in caught.value.hint
    assert "`train`" in caught.value.hint


def test_labels_beyond_the_classes_are_refused(tmp_path):
    folder = parquet(tmp_path / "d", image=[png(tinted(0, (1,)), tmp_path / "a.png")] * 2, label=[0, 2])
    with pytest.raises(InputError, match="labels go from 0 to 2, but the task has 2 classes"):
        load_images(task(folder, classes=("a", "b")))


def test_more_classes_than_the_data_have_are_refused(data):
    with pytest.raises(InputError, match="the data have 3 classes, the task has 4"):
        load_images(task(data, classes=("a", "b", "c", "d")))


def test_data_without_class_names_need_them_from_the_recipe(tmp_path):
    folder = parquet(tmp_path / "d", image=[png(tinted(0, (1,)), tmp_path / "a.png")], label=[0])
    with pytest.raises(InputError, match="has no class names of its own"):
        load_images(task(folder))


@pytest.mark.parametrize("label", [None, 0.5])
def test_labels_that_are_no_whole_numbers_are_refused(tmp_path, label):
    folder = parquet(tmp_path / "d", image=[png(tinted(0, (1,)), tmp_path / "a.png")], label=[label])
    with pytest.raises(InputError, match="row 0: expected a whole number as label"):
        load_images(task(folder, classes=("a",)))


@pytest.mark.parametrize("stored", [b"no image", None, b"\x89PNG\r\n\x1a\n"])
def test_an_image_that_cannot_be_read_is_named_by_its_number(tmp_path, stored):
    good = png(tinted(0, (1,)), tmp_path / "a.png")
    folder = parquet(tmp_path / "d", image=[good, {"bytes": stored, "path": None}], label=[0, 0])
    images = load_images(task(folder, classes=("a",)))
    assert images[0][1] == 0
    with pytest.raises(InputError, match="split `test`, image 1: cannot be read"):
        images[1]


def test_an_empty_split_is_refused(data, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_parquet(
        str(data / "test-00000-of-00001.parquet"), cache_dir=str(tmp_path / "c")
    )
    table.select(range(0)).to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(InputError, match="split `test`: has no images"):
        load_images(task(tmp_path))


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="split `test`: cannot be read"):
        load_images(task(tmp_path))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not here")
def test_real_images_fit_their_built_in_tasks():
    from dataclasses import replace

    for name, count in (("mnist", 1000), ("gtsrb", 1462), ("fashion_mnist", 1000)):
        known = replace(find(name), config=None, match="position")
        images = load_images(replace(known, data=parse_source(str(REAL / name), Path())))
        assert len(images) == count
        assert images[count - 1][0].mode == "RGB"
    with pytest.raises(InputError, match="the data have 10 classes, the task has 47"):
        load_images(replace(find("dtd"), data=parse_source(str(REAL / "dtd10"), Path())))


@pytest.mark.parametrize("limit", range(1, 12))
def test_a_balanced_choice_is_even_and_part_of_every_larger_one(limit):
    labels = [0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2]
    chosen = balanced(labels, limit)
    counts = Counter(labels[number] for number in chosen)
    assert len(set(chosen)) == limit
    assert set(chosen) < set(balanced(labels, limit + 1))
    if limit <= 6:
        assert max(counts.values()) - min(counts[label] for label in range(3)) <= 1
