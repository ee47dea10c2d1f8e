from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mergecli.clip.model import Clip, load_clip
from mergecli.clip.preprocessing import Normalization, resize_and_crop_of
from mergecli.data.decoding import resized_and_cropped
from mergecli.runtime.errors import InputError
from tests.support.processor import configured, pixel_values
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
    want = other.processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
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
