from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mergecli.clip.model import Clip, load_clip
from mergecli.clip.preprocessing import Normalization, resize_and_crop_of
from mergecli.data.decoding import resized_and_cropped
from mergecli.runtime.errors import InputError, MergecliWarning
from tests.support.processor import configured, pixel_values, their_processor
from tests.support.tiny_clip import make_tiny_clip, tinted


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return load_clip(make_tiny_clip(tmp_path_factory.mktemp("preprocessing") / "clip"))


@pytest.mark.parametrize("size", [(16, 16), (40, 30), (30, 41), (5, 3), (3, 200), (333, 16), (17, 16)])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"size": {"shortest_edge": 16}, "crop_size": {"height": 9, "width": 12}},
        {"size": {"shortest_edge": 11}, "crop_size": {"height": 16, "width": 15}},
        {"size": {"height": 20, "width": 13}, "crop_size": {"height": 15, "width": 16}, "resample": 2},
        {"size": {"height": 10, "width": 13}, "do_center_crop": False},
        {"do_resize": False},
    ],
    ids=["clip", "crop", "margin", "fixed", "no crop", "no resize"],
)  # fmt: skip
def test_resized_and_cropped_bytes_are_the_processor_s_own(clip, tmp_path, size, given):
    other = configured(clip, tmp_path / "other", **given)
    noise = np.random.default_rng(list(size)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)
    want = their_processor(other)(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
    framing, shape = resize_and_crop_of(other)
    got = resized_and_cropped(image, framing)
    assert got.dtype == np.uint8
    assert got.shape == (3, *shape)
    assert np.array_equal(got, want["pixel_values"][0])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
        {"rescale_factor": 0.0039},
        {"rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"do_rescale": False},
    ],
    ids=["clip", "mean", "odd factor", "half", "not normalized", "not rescaled"],
)
def test_normalized_pixels_are_the_processor_s_own_bit_by_bit(clip, tmp_path, given):
    other = configured(clip, tmp_path / "other", **given)
    image = tinted(0, (3,), side=40).resize((40, 30))
    batch = torch.from_numpy(resized_and_cropped(image, resize_and_crop_of(other)[0]))[None]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, 3, 1, 256)
    assert torch.equal(Normalization(other)(batch), pixel_values(other, [image]))
    assert len(Normalization(other)(every).unique()) >= 256


def test_a_processor_of_another_kind_is_refused(clip, tmp_path):
    other = configured(clip, tmp_path / "other", size={"shortest_edge": 16, "longest_edge": 99})
    with pytest.raises(InputError, match="its image processor is not one of CLIP's"):
        resize_and_crop_of(other)


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ({"resample": "bicubic"}, {"resample": 3}),
        ({"resample": "BILINEAR"}, {"resample": 2}),
        ({"resample": 3.0}, {"resample": 3}),
        ({"image_mean": 0.5, "image_std": 0.25}, {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}),
        ({"crop_size": None, "size": {"height": 16, "width": 16}}, {"size": {"height": 16, "width": 16}}),
        ({"crop_size": 16, "size": 16}, {}),
        ({"crop_size": [16, 16]}, {}),
        (
            {"do_resize": True, "do_center_crop": None, "size": [16, 16]},
            {"size": {"height": 16, "width": 16}},
        ),
    ],
)
def test_a_processor_that_is_written_otherwise_gives_the_same_numbers(clip, tmp_path, written, plain):
    image = tinted(0, (3,), side=40).resize((40, 30))
    got, want = (
        configured(clip, tmp_path / str(number), **given) for number, given in enumerate((written, plain))
    )
    (one, shape), (two, _) = resize_and_crop_of(got), resize_and_crop_of(want)
    pixels, expected = resized_and_cropped(image, one), resized_and_cropped(image, two)
    assert shape == (16, 16)
    assert np.array_equal(pixels, expected)
    batch = torch.from_numpy(pixels)[None]
    assert torch.equal(Normalization(got)(batch), Normalization(want)(batch))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"resample": "bicubik"}, "`resample`: expected a number from 0 to 5 or one of nearest, lanczos, bilinear, bicubic, "
                                  'box, hamming, got "bicubik" (did you mean `bicubic`?)'),
        ({"resample": 9}, "`resample`: expected a number from 0 to 5 or one of nearest, lanczos, bilinear, bicubic, box, "
                          "hamming, got 9"),
        ({"resample": None}, "`resample`: expected a number from 0 to 5 or one of nearest, lanczos, bilinear, bicubic, "
                             "box, hamming, got nothing"),
        ({"rescale_factor": 0}, "`rescale_factor`: expected a number above 0, got 0"),
        ({"rescale_factor": "1/255"}, '`rescale_factor`: expected a number above 0, got "1/255"'),
        ({"image_mean": [0.5]}, "`image_mean`: expected three numbers, one for each channel, got [0.5]"),
        ({"image_mean": None}, "`image_mean`: expected three numbers, one for each channel, got nothing"),
        ({"image_std": [0.5, 0.5, 0]}, "`image_std`: expected three numbers above 0, one for each channel, got "
                                       "[0.5, 0.5, 0]"),
    ],
)  # fmt: skip
def test_a_processor_with_values_that_mean_nothing_is_refused(clip, tmp_path, given, line):
    with pytest.raises(InputError) as caught:
        configured(clip, tmp_path / "other", **given)
    assert caught.value.message == f"{tmp_path / 'other'}: its image processor cannot be used:\n  {line}"


def written(clip, folder, name, **given):
    """The CLIP's folder with other values in one of its files."""
    shutil.copytree(clip.path, folder)
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    return folder


@pytest.mark.parametrize(
    ("given", "height", "width"),
    [
        ({"crop_size": {"height": 24, "width": 24}}, 24, 24),
        ({"size": {"height": 16, "width": 20}, "do_center_crop": False}, 16, 20),
        ({"crop_size": 8}, 8, 8),
    ],
)
def test_a_processor_whose_images_the_tower_does_not_take_is_refused(clip, tmp_path, given, height, width):
    folder = written(clip, tmp_path / "other", "preprocessor_config.json", **given)
    with pytest.raises(InputError) as caught:
        load_clip(folder)
    assert str(caught.value) == (
        f"{folder}: its image processor gives {height} x {width} pixels, its vision tower takes 16 x 16\n"
        "hint: copy `preprocessor_config.json` of the model that the tower was made from; or set `size` and "
        "`crop_size` in it"
    )


def test_no_crop_of_a_shorter_side_gives_images_of_several_sizes(clip, tmp_path):
    folder = written(clip, tmp_path / "other", "preprocessor_config.json", crop_size=None)
    with pytest.raises(InputError) as caught:
        load_clip(folder)
    assert str(caught.value) == (
        f"{folder}: its image processor crops nothing, so that images of several sizes come out\n"
        "hint: `preprocessor_config.json` should have `do_center_crop`, and `crop_size` of the size that the tower takes"
    )


@pytest.mark.parametrize("content", ["[1, 2]", "null", "{", "3", "[" * 100_000])
def test_a_processor_that_is_no_table_is_refused(clip, tmp_path, content):
    shutil.copytree(clip.path, tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").write_text(content)
    with pytest.raises(InputError) as caught:
        load_clip(tmp_path / "other")
    assert caught.value.message == (
        f"{tmp_path / 'other' / 'preprocessor_config.json'}: expected a table of JSON: how images are prepared"
    )


@pytest.mark.parametrize(
    ("given", "largest"), [({"do_rescale": False}, "974"), ({"rescale_factor": 1.0}, "974")]
)
def test_pixels_that_are_not_near_one_are_warned_of(clip, tmp_path, given, largest):
    folder = written(clip, tmp_path / "other", "preprocessor_config.json", **given)
    with pytest.warns(MergecliWarning) as caught:
        load_clip(folder)
    assert [str(each.message) for each in caught] == [
        f"{folder}: its image processor makes {largest} of a pixel; expected numbers near 1: `do_rescale`, "
        "`rescale_factor`, `image_mean` and `image_std` may not be those that the tower was trained with"
    ]
