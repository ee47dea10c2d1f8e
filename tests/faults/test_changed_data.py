"""Data that change after their digest was taken: what is read of them then is of no use, and is refused."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergecli.clip.model import load_clip
from mergecli.clip.pixels import Processing, cached_pixels
from mergecli.data import tables
from mergecli.data.images import Images, load_images
from mergecli.data.tasks import Task, find
from mergecli.evaluation.evaluate import evaluate
from mergecli.recipe.reading import recipe_of
from mergecli.runtime.errors import InputError
from tests.support.tiny_clip import CLASSES, make_image_folder, make_image_task, make_tiny_clip

pytestmark = pytest.mark.usefixtures("own_store")

HINT = "hint: wait until whatever writes it has finished, then start again"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("changed") / "base")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_task(tmp_path_factory.mktemp("changed") / "shards", train=6, test=6)


def recipe(base: Path, *names: str) -> Path:
    text = [
        f'base = "{base}"',
        *(f"[tasks.{name}]\ndata = '{name}'\ntemplates = ['a {{}}']" for name in names),
    ]
    Path("r.toml").write_text("\n".join(text))
    return Path("r.toml")


def task(base: Path, name: str) -> Task:
    return find(name, recipe_of(recipe(base, name)))


def table(folder: Path) -> Path:
    """A CSV beside a folder of images; no folder says the class of one."""
    make_image_folder(folder / "files")
    rows = [f"files/{name}/{number}.png,{name}" for name in CLASSES for number in range(2)]
    (folder / "metadata.csv").write_text("file_name,label\n" + "\n".join(rows) + "\n")
    return folder


def written_to(file: Path) -> None:
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(1, 1))


def replaced(file: Path) -> None:
    shutil.copy2(file, file.with_name("other"))
    file.with_name("other").replace(file)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


CHANGES = pytest.mark.parametrize("change", [written_to, replaced, cut])
Change = Callable[[Path], None]


def pixels(base: Path, images: Images, workers: int = 1) -> object:
    return cached_pixels(load_clip(base), images, Processing(workers=workers, max_size=10**9))


@CHANGES
@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_of_a_folder(base: Path, change: Change, workers: int) -> None:
    images = load_images(task(base, make_image_folder(Path("birds")).name))
    file = Path("birds", "green", "1.png")
    change(file)
    message = f"birds (task `birds`): split `test`, image 3: cannot be read: {file} changed while it was being read\n{HINT}"
    with pytest.raises(InputError, match=re.escape(message)):
        pixels(base, images, workers)
    with pytest.raises(InputError, match=re.escape(message)):
        images[3]
    assert images[0][1] == 0


@CHANGES
def test_an_image_that_a_table_names(base: Path, change: Change) -> None:
    images = load_images(task(base, table(Path("birds")).name))
    file = Path("birds", "files", "green", "1.png")
    change(file)
    with pytest.raises(
        InputError,
        match=re.escape(f"image 3: cannot be read: {file} changed while it was being read\n{HINT}"),
    ):
        pixels(base, images)


@CHANGES
def test_a_parquet_file(base: Path, shards: Path, change: Change) -> None:
    shutil.copytree(shards, "birds")
    images = load_images(task(base, "birds"))
    file = Path("birds", "test-00000-of-00001.parquet")
    change(file)
    with pytest.raises(InputError, match=re.escape(f"{file}: changed while it was being read\n{HINT}")):
        pixels(base, images)


def test_a_file_while_it_is_hashed_and_a_table_while_it_is_read(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = tables._read

    def and_written(path: Path, where: str) -> Any:
        found = read(path, where)
        with path.open("a") as more:
            more.write("files/red/0.png,red\n")
        return found

    monkeypatch.setattr(tables, "_read", and_written)
    csv = table(Path("birds")) / "metadata.csv"
    with pytest.raises(InputError, match=re.escape(f"{csv}: changed while it was being read\n{HINT}")):
        load_images(task(base, "birds"))


def test_what_is_in_the_cache_already_is_of_the_digest_and_counts(base: Path) -> None:
    images = load_images(task(base, make_image_folder(Path("birds")).name))
    before = cached_pixels(load_clip(base), images).batch(0, 6)
    cut(Path("birds", "green", "1.png"))
    assert cached_pixels(load_clip(base), images).batch(0, 6).equal(before)


def test_an_evaluation_ends_with_the_file_and_writes_no_score(base: Path) -> None:
    make_image_folder(Path("first"))
    make_image_folder(Path("second"), images=3)

    def change(task: str, done: int, total: int) -> None:
        if task == "first" and done == total:
            replaced(Path("second", "red", "0.png"))

    with pytest.raises(InputError, match=r"second/red/0\.png changed while"):
        evaluate(
            [base],
            tasks=["first", "second"],
            recipe=recipe(base, "first", "second"),
            output="out.json",
            progress=change,
        )
    assert not Path("out.json").exists()
