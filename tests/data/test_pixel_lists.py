"""Pixels as nested lists: one layout is read, every other is named."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from mergecli.data.pixel_lists import png_of

PIXELS = np.arange(5 * 7 * 3).reshape(5, 7, 3)


def read(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[:, :, 0], np.concatenate([PIXELS, PIXELS[:, :, :1]], 2)])
def test_eight_bit_pixels_are_as_they_are(pixels: np.ndarray) -> None:
    assert np.array_equal(read(png_of(pixels.tolist())), pixels)


def test_one_channel_is_gray() -> None:
    assert np.array_equal(read(png_of(PIXELS[:, :, :1].tolist())), PIXELS[:, :, 0])


def test_floating_point_numbers_from_zero_to_one_are_scaled() -> None:
    assert read(png_of([[0.0, 0.5], [0.25, 1.0]])).tolist() == [[0, 128], [64, 255]]


def test_true_is_white() -> None:
    assert read(png_of([[True, False]])).tolist() == [[255, 0]]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (PIXELS.transpose(2, 0, 1).tolist(), "are lists of 3 x 5 x 7, which has the channels first"),
        (
            PIXELS[:, :, :1].transpose(2, 0, 1).tolist(),
            "are lists of 1 x 5 x 7, which has the channels first",
        ),
        (PIXELS.reshape(-1).tolist(), "are lists of 105"),
        (PIXELS[None].tolist(), "are lists of 1 x 5 x 7 x 3"),
        ([[1, 2], [3]], "are lists of different lengths"),
        ([[256, 0]], "are whole numbers from 0 to 256, not from 0 to 255"),
        ([[-1, 0]], "are whole numbers from -1 to 0, not from 0 to 255"),
        ([[0.0, 255.0]], "are floating-point numbers from 0 to 255, not from 0 to 1"),
        ([[float("nan"), 1.0]], "are floating-point numbers from nan to nan, not from 0 to 1"),
        ([["a", "b"]], "are lists of 1 x 2 that are not numbers"),
        ([[], []], "are lists of 2 x 0 numbers"),
    ],
)
def test_other_layouts_and_ranges_are_refused(values: object, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        png_of(values)
