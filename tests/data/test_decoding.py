from __future__ import annotations

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from mergecli.data.decoding import (
    Block,
    Decoders,
    EncodedImage,
    ResizeAndCrop,
    Unreadable,
    UnreadableImageError,
    decode_block,
    decoded,
    resized_and_cropped,
)
from tests.support.tiny_clip import tinted


def test_an_image_is_turned_as_its_exif_orientation_says():
    image, buffer = tinted(0, (1,)).crop((0, 0, 10, 20)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(buffer, "PNG", exif=exif)
    assert decoded(EncodedImage(buffer.getvalue())).size == (20, 10)


def test_a_worker_that_dies_is_replaced_by_this_process():
    framing = ResizeAndCrop(8, None, 3, (8, 8))
    image = io.BytesIO()
    tinted(0, (1,)).save(image, "PNG")
    block = Block([EncodedImage(image.getvalue())], framing, None, [""])
    with Decoders(2) as decoders:
        assert np.array_equal(decoders.submit(lambda: block).result(), decode_block(block))
        for child in decoders._children:
            child.kill()
            child.wait()
        assert np.array_equal(decoders.submit(lambda: block).result(), decode_block(block))


def test_a_worker_imports_no_torch():
    code = "import sys, mergecli.data.decoding; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_picture_is_unreadable():
    block = Block([EncodedImage(None)], ResizeAndCrop(8, None, 3, (8, 8)), None, [""])
    assert decode_block(block) == Unreadable(0, "there is none")


def test_a_transparent_color_of_a_palette_is_kept():
    """The processor of transformers 5 would make it white: see `resized_and_cropped`."""
    image, buffer = Image.new("P", (4, 4), 1), io.BytesIO()
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(buffer, "PNG", transparency=1)
    pixels = resized_and_cropped(decoded(EncodedImage(buffer.getvalue())), ResizeAndCrop(None, None, 3, None))
    assert {tuple(each) for each in pixels.reshape(3, -1).T.tolist()} == {(0, 255, 0)}


CHILDREN = """
import time
from mergecli.data.decoding import Block, Decoders, EncodedImage, ResizeAndCrop
with Decoders(2) as decoders:  # no `if __name__ == "__main__"`: a caller's script may lack it
    decoders.submit(lambda: Block([EncodedImage(None)], ResizeAndCrop(8, None, 3, (8, 8)), None, [""])).result()
    print(len(decoders._children), flush=True)
    time.sleep(60)
"""


def test_children_end_with_a_process_that_is_killed(tmp_path):
    """They hold its stderr open for as long as they live."""
    (tmp_path / "script.py").write_text(CHILDREN)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    process.kill()
    assert process.communicate(timeout=30) == ("", "")


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> EncodedImage:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return EncodedImage(buffer.getvalue())


SIXTEEN = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)


@pytest.mark.parametrize(
    "stored",
    [
        encoded(Image.fromarray(SIXTEEN)),
        encoded(Image.fromarray(SIXTEEN), "TIFF"),
        EncodedImage(b"P5 2 2 65535\n" + SIXTEEN.astype(">u2").tobytes()),
        encoded(Image.fromarray((SIXTEEN / 65535).astype(np.float32)), "TIFF"),
        encoded(Image.fromarray(65535 - SIXTEEN), "TIFF", tiffinfo={262: 0}),
        EncodedImage(b"P5 2 2 255\n" + bytes([0, 100, 200, 255])),
    ],
    ids=["PNG", "TIFF", "PGM", "float TIFF", "white is zero", "8 bits"],
)
def test_gray_of_any_depth_is_scaled_by_the_range_of_its_type(stored: EncodedImage) -> None:
    assert np.asarray(decoded(stored))[:, :, 1].tolist() == [[0, 100], [200, 255]]


def test_a_mode_that_the_data_name_comes_after_the_scaling() -> None:
    content = encoded(Image.fromarray(SIXTEEN)).content
    assert np.asarray(decoded(EncodedImage(content, "L")))[:, :, 0].tolist() == [[0, 100], [200, 255]]


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (
            encoded(Image.fromarray(np.array([[0, 255.0]], np.float32)), "TIFF"),
            "floating-point numbers from 0 to 255",
        ),
        (
            encoded(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"),
            "floating-point numbers from nan to nan",
        ),
        (
            encoded(Image.fromarray(np.array([[0, 1 << 20]], np.int32)), "TIFF"),
            "whole numbers of 32 bits or with a sign",
        ),
    ],
)
def test_pixels_of_an_unknown_range_are_refused(stored: EncodedImage, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        decoded(stored)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation: int) -> None:
    image, exif = tinted(0, (1,)).crop((0, 0, 10, 20)), Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(image, exif=exif)
    assert isinstance(stored.content, bytes)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(stored.content)))
    assert np.array_equal(np.asarray(decoded(stored)), np.asarray(expected))


@pytest.mark.parametrize(
    "error", [struct.error("unpack"), SyntaxError("no exif"), KeyError(1), RecursionError()]
)
def test_an_exif_that_cannot_be_read_does_not_keep_the_image_from_being_read(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(_: object) -> None:
        raise error

    stored = encoded(tinted(0, (1,)))
    monkeypatch.setattr(Image.Image, "getexif", broken)
    assert decoded(stored).size == (20, 20)


@pytest.mark.parametrize(
    "error", [MemoryError(), struct.error("unpack"), IndexError("odd"), AssertionError(), OverflowError("x")]
)
def test_whatever_a_decoder_raises_the_image_is_named(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def broken(_: object) -> None:
        raise error

    stored = encoded(tinted(0, (1,)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
    found = decode_block(Block([stored], ResizeAndCrop(8, None, 3, (8, 8)), None, [""]))
    reason = (
        "it needs more memory than there is"
        if isinstance(error, MemoryError)
        else str(error) or "AssertionError"
    )
    assert found == Unreadable(0, reason)


@pytest.mark.parametrize("size", [(1, 300_000), (300_000, 1)])
def test_a_thin_image_that_would_fill_the_memory_is_refused(size: tuple[int, int]) -> None:
    stored = encoded(Image.new("1", size))
    assert len(stored.content or b"") < 1000
    found = decode_block(Block([stored], ResizeAndCrop(224, None, 3, (224, 224)), None, [""]))
    other = (224, 224 * 300_000) if size[0] == 1 else (224 * 300_000, 224)
    assert found == Unreadable(
        0, f"it is too thin: {size[0]:,} x {size[1]:,} pixels would be resized to {other[0]:,} x {other[1]:,}"
    )
