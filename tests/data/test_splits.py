"""The digest of a data folder: of what it holds, read as seldom as can be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mergecli.data import splits
from mergecli.data.images import load_images
from mergecli.storage import cache as caching
from tests.data.test_images import parquet, task
from tests.support.tiny_clip import CLASSES, make_image_task, tinted


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_task(tmp_path_factory.mktemp("data") / "tints")


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """How many files were read for a digest at a time; small files count as large, and young ones as old."""
    found: list[int] = []
    lines = splits._lines
    monkeypatch.setattr(splits, "LARGE", 1)
    monkeypatch.setattr(splits, "_SETTLED", -60.0)
    monkeypatch.setattr(
        splits, "_lines", lambda files, *more: found.append(len(files)) or lines(files, *more)
    )
    return found


def test_large_files_that_nobody_touched_are_read_once_for_their_digest(data, tmp_path, reads, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "copy")
    first = load_images(task(copy)).fingerprint
    assert reads == [1]
    assert load_images(task(copy)).fingerprint == first
    assert reads == [1]
    assert load_images(task(copy), "train").fingerprint != first
    assert reads == [1, 1]
    assert [entry.what for entry in caching.cache(["digests"]).entries] == [
        "the digest of 1 files in copy"
    ] * 2
    load_images(task(copy), remember=False)
    assert reads == [1, 1, 1]
    monkeypatch.setattr(
        splits, "_SETTLED", 3600.0
    )  # a file that may still be written within one tick of the clock
    load_images(task(copy))
    assert reads == [1, 1, 1, 1]


def test_a_file_of_the_same_name_size_and_time_is_read_again(data, tmp_path, reads):
    copy = shutil.copytree(data, tmp_path / "copy")
    path = copy / "test-00000-of-00001.parquet"
    before, first = path.stat(), load_images(task(copy)).fingerprint
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert splits.fingerprint([path], with_names=False).digest != first
    assert reads == [1, 1]


def test_without_a_cache_digests_are_not_kept(data, reads, monkeypatch):
    monkeypatch.setenv("MERGECLI_CACHE_SIZE", "0")
    for _ in range(2):
        load_images(task(data))
    assert reads == [1, 1]


@pytest.mark.parametrize("kind", ["struct", "text"])
def test_images_that_a_table_only_names_count_in_its_fingerprint(tmp_path: Path, kind: str) -> None:
    file, folder = tmp_path / "a.png", tmp_path / "data"
    tinted(0, (0, 0, 0)).save(file)
    folder.mkdir()
    image = {"bytes": None, "path": str(file)} if kind == "struct" else str(file)
    parquet(folder, image=[image], label=[0])

    def found() -> str:
        return load_images(task(folder, classes=CLASSES)).fingerprint

    first = found()
    assert load_images(task(folder, classes=CLASSES))[0][0].tobytes() == tinted(0, (0, 0, 0)).tobytes()
    tinted(1, (9, 9, 9)).save(file)
    assert found() != first
    file.unlink()  # what is missing is said when it is looked at
    assert found() != first
