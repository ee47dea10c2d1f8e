from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergecli.clip import pixels as pixels_module
from mergecli.clip.model import Clip, load_clip
from mergecli.clip.pixels import Processing, cached_pixels, chunks, decoded_batches, stored_pixels
from mergecli.clip.preprocessing import Normalization
from mergecli.data.decoding import (
    Corruption,
    EncodedImage,
)
from mergecli.data.images import Images, load_images
from mergecli.data.tasks import TaskTable, find
from mergecli.recipe.schema import Recipe
from mergecli.runtime.errors import InputError, MergecliWarning
from mergecli.storage import cache as caching
from mergecli.storage.sources import parse_source
from tests.support.kept_files import flip
from tests.support.processor import configured, pixel_values
from tests.support.tiny_clip import make_image_task, make_tiny_clip

REAL = Path(os.environ.get("MERGECLI_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
ROOM = Processing(max_size=10**9)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MERGECLI_HOME", str(tmp_path / "home"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "home"
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return load_clip(make_tiny_clip(tmp_path_factory.mktemp("pixels") / "clip"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_task(tmp_path_factory.mktemp("pixels") / "tints")


def images_of(data: Path, split: str = "test") -> Images:
    table = TaskTable(data=parse_source(str(data), Path()), templates=("{}",))
    return load_images(find("tints", Recipe(tasks={"tints": table})), split)


def files(home: Path) -> list[Path]:
    return sorted((home / "cache" / "pixels").glob("*"))


def test_pixels_and_labels_are_those_of_the_images_in_their_order(clip, data, home):
    images = images_of(data)
    found = cached_pixels(clip, images, ROOM)
    assert found.labels.tolist() == [label for _, label in images]
    want = pixel_values(clip, [image for image, _ in images])
    normalise = Normalization(clip)
    assert torch.equal(normalise(found.batch(0, len(images))), want)
    assert torch.equal(normalise(found.batch(3, 5)), want[3:5])
    assert torch.equal(normalise(found.rows(torch.tensor([7, 0, 7]))), want[[7, 0, 7]])
    assert found.stored is not None
    assert len(files(home)) == 1


def test_what_is_in_the_cache_is_not_decoded_again(clip, data):
    cached_pixels(clip, images_of(data), ROOM)

    def refuse(row: int) -> EncodedImage:
        raise AssertionError("an image was decoded")

    again = replace(images_of(data), encoded=refuse)
    assert len(cached_pixels(clip, again, ROOM).batch(0, 12)) == 12
    (whole,) = chunks(clip, again, ROOM, 5, 0)
    assert len(whole) == 12


def test_chosen_images_are_found_in_the_file_of_all(clip, data, home):
    whole = cached_pixels(clip, images_of(data), ROOM)
    some = cached_pixels(clip, images_of(data).chosen([9, 2, 4]), ROOM)
    assert torch.equal(some.batch(0, 3), whole.rows(torch.tensor([9, 2, 4])))
    assert torch.equal(some.rows(torch.tensor([2, 2])), whole.rows(torch.tensor([4, 4])))
    assert len(files(home)) == 1


def test_other_content_labels_processors_and_corruptions_have_files_of_their_own(clip, data, tmp_path, home):
    images = images_of(data)
    other = configured(clip, tmp_path / "other", crop_size={"height": 12, "width": 12})
    for number, (one, these, how) in enumerate(
        [
            (clip, images, ROOM),
            (clip, images_of(data, "train"), ROOM),
            (clip, images.chosen([1, 2]), replace(ROOM, corruption=Corruption("contrast", 1))),
            (clip, images, replace(ROOM, corruption=Corruption("contrast", 2))),
            (other, images, ROOM),
        ],
        1,
    ):
        cached_pixels(one, these, how)
        assert len(files(home)) == number


@pytest.mark.parametrize("size", [1, 5, 12, 50])
@pytest.mark.parametrize("workers", [1, 3])
def test_batch_size_and_processes_change_no_pixel(clip, data, size, workers):
    images = images_of(data, "train")
    want = torch.cat(list(decoded_batches(clip, images, Processing(workers=1), 30)))
    how = Processing(workers=workers, ahead=2)
    batches = list(decoded_batches(clip, images, how, size))
    assert [len(batch) for batch in batches] == [min(size, 30 - start) for start in range(0, 30, size)]
    assert torch.equal(torch.cat(batches), want)


def test_spans_hold_whole_batches_and_what_there_is_room_for(clip, data):
    images = images_of(data, "train")
    one = 3 * 16 * 16
    for room, want in ((0, [8, 8, 8, 6]), (17 * one, [16, 14]), (99 * one, [30])):
        parts = list(chunks(clip, images, Processing(), 8, room))
        assert [len(part) for part in parts] == want
        assert torch.cat([part.labels for part in parts]).tolist() == images.labels


def test_a_corruption_is_the_same_in_every_process_and_order(clip, data):
    images = images_of(data, "train")
    noise = Processing(corruption=Corruption("gaussian_noise", 3), workers=1)
    want = torch.cat(list(decoded_batches(clip, images, noise, 30)))
    assert not torch.equal(want, torch.cat(list(decoded_batches(clip, images, Processing(), 30))))
    many = torch.cat(list(decoded_batches(clip, images, replace(noise, workers=3), 4)))
    assert torch.equal(many, want)
    (some,) = decoded_batches(clip, images.chosen([20, 3]), noise, 4)
    assert torch.equal(some, want[[20, 3]])
    assert not torch.equal(want[0], want[3])


@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_image_is_named_and_nothing_is_kept(clip, data, home, workers):
    images = images_of(data)
    broken = replace(
        images, encoded=lambda row: EncodedImage(b"no image") if row == 7 else images.encoded(row)
    )
    with pytest.raises(
        InputError, match="split `test`, image 7: cannot be read: it is no image of a kind that Pillow knows"
    ):
        cached_pixels(clip, broken, replace(ROOM, workers=workers))
    assert files(home) == []


def test_an_evaluation_that_stops_in_the_middle_keeps_nothing(clip, data, home):
    batches = decoded_batches(clip, images_of(data), ROOM, 4)
    next(batches)
    assert [file.suffix for file in files(home)] == [".part"]
    batches.close()
    assert files(home) == []


def test_two_at_once_do_no_harm(clip, data, home):
    one, other = (decoded_batches(clip, images_of(data), ROOM, 4) for _ in range(2))
    first = [next(one), next(other), *one, *other]
    assert len(first) == 6
    assert [file.suffix for file in files(home)] == [".safetensors"]
    assert cached_pixels(clip, images_of(data), ROOM).stored is not None


@pytest.mark.parametrize("how", [Processing(), Processing(max_size=100)], ids=["none", "small"])
def test_without_room_the_images_are_decoded_at_every_use(clip, data, home, how):
    images = images_of(data)
    want = cached_pixels(clip, images, ROOM).batch(2, 5).clone()
    shutil.rmtree(home)
    found = cached_pixels(clip, images, how)
    assert found.stored is None
    assert torch.equal(found.batch(2, 5), want)
    assert torch.equal(found.rows(torch.tensor([4, 2])), want[[2, 0]])
    assert files(home) == []


def test_a_cache_that_cannot_be_written_is_done_without(clip, data, home):
    home.write_text("a file where the folder should be")
    assert cached_pixels(clip, images_of(data), ROOM).stored is None
    assert sum(map(len, decoded_batches(clip, images_of(data), ROOM, 5))) == 12


def test_a_disk_that_fills_up_is_noticed_and_done_without(clip, data, home, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pixels_module.SafetensorsWriter, "write", full)
    assert sum(map(len, decoded_batches(clip, images_of(data), ROOM, 5))) == 12
    assert files(home) == []


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_a_damaged_file_of_the_cache_is_made_anew(clip, data, home, damage):
    want = cached_pixels(clip, images_of(data), ROOM).batch(0, 12).clone()
    (file,) = files(home)
    file.write_bytes(file.read_bytes()[:-10] if damage is None else damage)
    with pytest.warns(MergecliWarning, match="; its images are decoded again$"):
        assert stored_pixels(clip, images_of(data), ROOM) is None
    assert torch.equal(cached_pixels(clip, images_of(data), ROOM).batch(0, 12), want)


def test_images_that_are_damaged_in_the_cache_are_decoded_again_when_they_are_used(clip, data, home):
    images = images_of(data)
    want = cached_pixels(clip, images, ROOM).batch(0, 12).clone()
    (file,) = files(home)
    start = len(file.read_bytes()) - want.numel()
    flip(file, 8 * (start + want[0].numel() * 5 + 3))
    found = cached_pixels(clip, images, ROOM)
    with pytest.warns(MergecliWarning) as notes:
        assert torch.equal(torch.cat([batch for batch, _ in found.batches(5)]), want)
    assert [str(each.message) for each in notes] == [
        f"{file}: is damaged: `pixels` is not what was written; its images are decoded again"
    ]
    assert files(home) == []
    assert torch.equal(cached_pixels(clip, images, ROOM).batch(0, 12), want)
    assert files(home) == [file]


def test_what_was_used_longest_ago_goes_first(clip, data, home):
    cached_pixels(clip, images_of(data), ROOM)
    cached_pixels(clip, images_of(data, "train"), ROOM)
    for number, name in enumerate(("test", "train")):
        os.utime(
            next(f for f in files(home) if f"`{name}`" in caching._what(f)), (1000 + number, 1000 + number)
        )
    cached_pixels(clip, images_of(data), ROOM)  # now `train` is the older one
    room = sum(file.stat().st_size for file in files(home))
    cached_pixels(clip, images_of(data), replace(ROOM, max_size=room, corruption=Corruption("contrast", 1)))
    kept = [entry.what for entry in caching.entries()]
    assert [("`train`" in what, "contrast" in what) for what in kept] == [(False, True), (False, False)]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not here")
@pytest.mark.parametrize("name", ["gtsrb", "eurosat"])
def test_real_images_become_the_processor_s_pixels(clip, name):
    table = TaskTable(data=parse_source(str(REAL / name), Path()), templates=("{}",), classes=None)
    images = load_images(find("real", Recipe(tasks={"real": table})), "test").chosen(range(0, 300, 3))
    found = cached_pixels(clip, images, replace(ROOM, workers=2))
    want = pixel_values(clip, [image for image, _ in images])
    assert torch.equal(Normalization(clip)(found.batch(0, len(images))), want)
    assert found.labels.tolist() == [label for _, label in images]
